"""A flow to deploy as it is: run one configuration and report how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import flow

from prefect_dstack.hooks import stop_dstack_runs
from prefect_dstack.tasks import arun_task, run_task

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun


def stop_own_runs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop the runs of a flow run whose parameter ``credentials`` names a saved block.

    ``flow``, ``flow_run`` and ``state`` come from Prefect. Raises the server errors.
    """
    stop_dstack_runs(flow_run.parameters.get("credentials"))(flow, flow_run, state)


@flow(on_cancellation=[stop_own_runs], on_crashed=[stop_own_runs])
def run_and_report(
    configuration: dict[str, Any],
    credentials: str | None = None,
    max_duration: int | str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a configuration on dstack, show its log and outcome in this flow run, and return the outcome.

    ``configuration``: the keys of a ``.dstack.yml``. ``credentials``: the name of a saved
    ``DstackCredentials`` block; without one the environment and ``~/.dstack/config.yml`` are used.
    ``max_duration``: seconds or ``"2h"``; the configuration's own, else 24 h. ``options``: further ones of
    ``run_task``, such as ``{"profile": "cheap", "repo_dir": "."}``; Prefect stores a flow's parameters in
    clear, so keep secrets out of them. The run is stopped when this flow run is cancelled or crashes. Raises
    as ``run_task`` does.
    """
    outcome: dict[str, Any] = run_task(
        configuration, credentials, max_duration=max_duration, **(options or {})
    )
    return outcome


@flow(on_cancellation=[stop_own_runs], on_crashed=[stop_own_runs])
async def arun_and_report(
    configuration: dict[str, Any],
    credentials: str | None = None,
    max_duration: int | str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a configuration on dstack and report: the async twin of ``run_and_report``."""
    outcome: dict[str, Any] = await arun_task(
        configuration, credentials, max_duration=max_duration, **(options or {})
    )
    return outcome
