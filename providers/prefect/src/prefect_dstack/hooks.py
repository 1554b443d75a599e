"""Flow hooks that stop what a cancelled or crashed flow run left running, and report how it ended.

``serve()`` and workers call them in a process of their own, also after a SIGKILL of the flow's. Nothing calls
them for a plain script (``python flow.py``) that is killed. Add them where the flow is defined.
Source: Prefect's documentation, "State change hooks".
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from prefect.logging.loggers import flow_run_logger

from prefect_dstack._orphaned_runs import stop_left_over
from prefect_dstack.credentials import CredentialsLike, load

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import FlowStateHook

Hook: TypeAlias = "FlowStateHook[..., Any]"


def stop_dstack_runs(credentials: CredentialsLike = None) -> Hook:
    """Return a hook that stops all runs of a flow run, for ``on_cancellation`` and ``on_crashed``.

    After a crash, runs submitted with ``on_crash="keep"`` are left alone, and those whose container is held
    for a shell (``debug_on_failure``); a cancellation stops these too, also if a signal then ended the
    process and the flow run crashed. Runs of subflows are stopped as well.
    The hook waits up to a minute for the runs to end and reports their ends in the flow run, also of runs
    that its own process stopped before it was killed. It raises the server errors; Prefect logs them.

    Args:
        credentials: A ``DstackCredentials`` block, the name of a saved one (loaded when the hook runs, which
            keeps the import of the flow free of requests), or None for the environment.

    Returns:
        The hook, which can be pickled.

    Example:
        ```python
        from prefect import flow

        from prefect_dstack import stop_dstack_runs

        stop_runs = stop_dstack_runs("my-credentials")


        @flow(on_cancellation=[stop_runs], on_crashed=[stop_runs])
        def train() -> None: ...
        ```
    """
    # A partial of a module's function can be pickled; Prefect names hooks of this kind by the function.
    return cast("Hook", partial(_stop_runs, credentials=credentials))


def stop_runs_on_cancellation(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop all dstack runs of a cancelled flow run, on the server that the environment names.

    Args:
        flow: The flow, from Prefect.
        flow_run: The flow run, from Prefect.
        state: Its state, from Prefect.

    Raises:
        ServerError: The server errors, which Prefect logs.
    """
    _stop_runs(flow, flow_run, state)


def stop_runs_on_crash(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop the dstack runs of a crashed flow run, on the server that the environment names.

    Runs submitted with ``on_crash="keep"``, and those whose container is held for a shell, are left
    alone unless the flow run was cancelled before.

    Args:
        flow: The flow, from Prefect.
        flow_run: The flow run, from Prefect.
        state: Its state, from Prefect.

    Raises:
        ServerError: The server errors, which Prefect logs.
    """
    _stop_runs(flow, flow_run, state)


def _stop_runs(
    flow: Flow[..., Any], flow_run: FlowRun, state: State[Any], *, credentials: CredentialsLike = None
) -> None:
    logger = flow_run_logger(flow_run, flow)
    stop_left_over(load(credentials), flow_run.id, crashed=state.is_crashed(), logger=logger)
