"""A flow to deploy as it is: run one configuration and report how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import flow

from dstack_core import OutcomeDict
from prefect_dstack.hooks import stop_dstack_runs
from prefect_dstack.tasks import arun_task, run_task

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun


def stop_own_runs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop the runs of a flow run whose parameter ``credentials`` names a saved block.

    Args:
        flow: The flow, from Prefect.
        flow_run: The flow run, from Prefect.
        state: Its state, from Prefect.

    Raises:
        ServerError: The server errors, which Prefect logs.
    """
    stop_dstack_runs(flow_run.parameters.get("credentials"))(flow, flow_run, state)


@flow(on_cancellation=[stop_own_runs], on_crashed=[stop_own_runs])
def run_and_report(
    configuration: dict[str, Any],
    credentials: str | None = None,
    max_duration: int | str | None = None,
    options: dict[str, Any] | None = None,
) -> OutcomeDict:
    """Run a configuration on dstack, show its log and outcome in this flow run, and return the outcome.

    The run is stopped when this flow run is cancelled or crashes. Prefect stores a flow's parameters in
    clear, so keep secrets out of them.

    Args:
        configuration: The keys of a ``.dstack.yml``.
        credentials: The name of a saved ``DstackCredentials`` block; without one the environment and
            ``~/.dstack/config.yml`` are used.
        max_duration: Seconds or ``"2h"``; by default the configuration's own, else 24 h.
        options: Further options of ``run_task``, such as ``{"profile": "cheap", "repo_dir": "."}``.

    Returns:
        The outcome, as ``run_task`` returns it.

    Raises:
        DstackError: As ``run_task``: a wrong value, the run's end, or a server error.
    """
    outcome: OutcomeDict = run_task(configuration, credentials, max_duration=max_duration, **(options or {}))
    return outcome


@flow(on_cancellation=[stop_own_runs], on_crashed=[stop_own_runs])
async def arun_and_report(
    configuration: dict[str, Any],
    credentials: str | None = None,
    max_duration: int | str | None = None,
    options: dict[str, Any] | None = None,
) -> OutcomeDict:
    """Run a configuration on dstack and report: the async twin of ``run_and_report``.

    Parameters, outcome and errors are the same.
    """
    outcome: OutcomeDict = await arun_task(
        configuration, credentials, max_duration=max_duration, **(options or {})
    )
    return outcome
