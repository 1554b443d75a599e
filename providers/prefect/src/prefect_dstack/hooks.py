"""Flow hooks that stop what a cancelled or crashed flow run left running.

They work in another process than the flow's, also after SIGKILL; add them where the flow is defined.
Source: Prefect's documentation, "State change hooks".
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from uuid import UUID

from prefect.logging.loggers import flow_run_logger

from prefect_dstack._connect import CredentialsLike, load, open_client
from prefect_dstack._names import flow_run_marker_prefix, outlives_crash
from prefect_dstack._stop import is_ending

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import FlowStateHook

    from dstack_core import Run

Hook: TypeAlias = "FlowStateHook[..., Any]"

# A run whose submission was at work when the process died may show only at the second look.
_LOOKS = 2
_PAUSE = 2.0
_DEEPEST_SUBFLOW = 10


def stop_dstack_runs(credentials: CredentialsLike = None) -> Hook:
    """Return a hook that stops all runs of a flow run, for ``on_cancellation`` and ``on_crashed``.

    ``credentials``: a ``DstackCredentials`` block, the name of a saved one (loaded when the hook runs,
    which keeps the import of the flow free of requests), or None for the environment. Use it as
    ``@flow(on_cancellation=[hook], on_crashed=[hook])``. After a crash, runs submitted with
    ``on_crash="keep"`` are left alone. Runs of subflows are stopped too. The hook raises the server
    errors; Prefect logs them.
    """
    # A partial of a module's function can be pickled; Prefect names hooks of this kind by the function.
    return cast("Hook", partial(_stop_runs, credentials=credentials))


def stop_runs_on_cancellation(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop all dstack runs of a cancelled flow run; finds the server through the environment.

    ``flow``, ``flow_run`` and ``state`` come from Prefect. Raises the server errors.
    """
    _stop_runs(flow, flow_run, state)


def stop_runs_on_crash(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop the dstack runs of a crashed flow run; finds the server through the environment.

    ``flow``, ``flow_run`` and ``state`` come from Prefect. Runs submitted with ``on_crash="keep"`` are
    left alone. Raises the server errors.
    """
    _stop_runs(flow, flow_run, state)


def _stop_runs(
    flow: Flow[..., Any], flow_run: FlowRun, state: State[Any], *, credentials: CredentialsLike = None
) -> None:
    logger = flow_run_logger(flow_run, flow)
    prefixes = tuple(flow_run_marker_prefix(str(run_id)) for run_id in _with_subflows(flow_run.id, logger))
    stopped: set[str] = set()
    with open_client(load(credentials), retry_budget=30.0) as client:
        for look in range(_LOOKS):
            if look:
                time.sleep(_PAUSE)
            for run in client.runs.list():
                if _is_left_over(run, prefixes, crashed=state.is_crashed()):
                    # Again where it was stopped before: a busy server may forget that.
                    run.stop()
                    if run.id not in stopped:
                        stopped.add(run.id)
                        logger.info("Asked the server to stop run %s", run.name)


def _is_left_over(run: Run, prefixes: tuple[str, ...], *, crashed: bool) -> bool:
    marker = run.marker or ""
    if is_ending(run) or not marker.startswith(prefixes):
        return False
    return not (crashed and outlives_crash(marker))


def _with_subflows(flow_run_id: UUID, logger: Any) -> list[UUID]:
    """Return the flow run and its subflows; without the Prefect server only the flow run itself."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    found = [flow_run_id]
    parents = [flow_run_id]
    try:
        with get_client(sync_client=True) as client:
            for _ in range(_DEEPEST_SUBFLOW):
                children = client.read_flow_runs(
                    flow_run_filter=FlowRunFilter(
                        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=parents)
                    )
                )
                parents = [child.id for child in children]
                found += parents
                if not parents:
                    break
    except Exception as error:
        logger.warning("Subflows of this flow run could not be looked up: %s", error)
    return found
