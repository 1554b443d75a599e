"""Find, judge and stop the runs that a flow run left running: for the hooks, the worker and the reaper.

The problem: a process that dies leaves runs that cost money. The processes that clean up know a flow run's
id, or nothing at all.

The idea: the markers on the runs name their flow run or task run, so the list of a project's runs is enough.
Hooks and worker stop the runs of one flow run (``stop_left_over``); the reaper asks Prefect for the owner of
each active run and stops those whose owner has ended (``_judge``).

The invariants: a run that Prefect does not know is left alone unless the caller wants otherwise; after a
crash, runs submitted with ``on_crash="keep"`` and runs that are held for a shell are left alone, unless a
cancellation was asked for before. A refused stop holds nothing up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack import _end_reports
from prefect_dstack._cancellation import quick_prefect_client, was_cancelled
from prefect_dstack._end_reports import Unreported
from prefect_dstack._names import flow_run_marker_prefix, outlives_crash
from prefect_dstack._orphaned_resources import delete_left_over
from prefect_dstack._stop import BACKSTOP
from prefect_dstack._subflows import with_subflows
from prefect_dstack.credentials import PATIENT_TIMEOUT, open_client

if TYPE_CHECKING:
    from dstack_core import Client, Run
    from dstack_core.integration import StopResult
    from prefect_dstack.credentials import DstackCredentials

# A run whose submission was in progress when the process died may appear only in the second poll; what
# appears later is left to the reaper. Further polls and longer pauses keep the flow run in Cancelling.
_POLLS = 2
_PAUSE = 2.0
# Prefect keeps a flow run in Cancelling until its hooks have returned, so they wait a minute and no longer;
# the reaper reports what needs more.
END_SECONDS = 60.0
# An unreachable dstack server keeps the flow run in Cancelling for this long; then the reaper is left.
_LIST_BUDGET = 30.0
# A mapped task may have a hundred runs, and a busy server needs seconds for each stop. More at once load a
# server that is busy already.
_STOPS_AT_ONCE = 8


def stop_left_over(block: DstackCredentials | None, flow_run_id: UUID, *, crashed: bool, logger: Any) -> None:
    """Stop the runs of a flow run and its subflows, wait for their ends and report them.

    After a crash, runs submitted with ``on_crash="keep"`` are left alone, and runs whose container is held
    for a shell; one that ended a flow run in Cancelling counts as a cancellation. Raises the server errors of
    the list of runs.
    """
    crashed = crashed and not _was_cancelled(flow_run_id, logger)
    reason = "the flow run crashed" if crashed else "the flow run was cancelled"
    flow_run_ids = with_subflows(flow_run_id, logger)
    prefixes = tuple(flow_run_marker_prefix(str(run_id)) for run_id in flow_run_ids)
    found: dict[str, Run] = {}
    stopped: set[str] = set()
    refused: set[str] = set()
    with open_client(block, PATIENT_TIMEOUT, retry_budget=_LIST_BUDGET) as client:
        for poll in range(_POLLS):
            if poll:
                time.sleep(_PAUSE)
            mine = [run for run in client.runs.list() if _is_left_over(run, prefixes, crashed=crashed)]
            found |= {run.id: run for run in mine}
            active = [run for run in mine if not run.last_status.is_ending and run.id not in stopped]
            results = stop_all(client, active, logger, reason)
            stopped |= {run.id for run in active}
            refused |= {
                run.id for run, result in zip(active, results, strict=True) if result.state == "refused"
            }
        # A run that the server does not let this user stop is not waited for.
        found = {run_id: run for run_id, run in found.items() if run_id not in refused}
        # A process that was killed right after its stop may have emitted nothing.
        for run in found.values():
            if run.id not in stopped:
                _end_reports.report_earlier_stop(run, logger)
        _report(client, found, stopped, flow_run_ids, logger)
        # Once their runs have ended: servers refuse to delete a fleet that runs use.
        delete_left_over(client, prefixes, logger, crashed=crashed)


def stop_all(client: Client, runs: Iterable[Run], logger: Any, reason: str) -> list[StopResult]:
    """Stop runs that were just seen active, several at once; emit ``dstack.run.stopping`` for each."""
    from dstack_core.integration import RunRef, stop_run

    def stop(run: Run) -> StopResult:
        report = _end_reports.StoppingReport(_end_reports.flow_run_of(run.marker), logger)
        result = stop_run(
            client,
            RunRef(run.name, run.marker or ""),
            run_id=run.id,
            submitted=True,
            timeout=PATIENT_TIMEOUT,
            log=logger,
            reason=reason,
            backstop=BACKSTOP,
            on_accepted=report,
        )
        report(result)
        return result

    with ThreadPoolExecutor(_STOPS_AT_ONCE, thread_name_prefix="dstack-stop") as pool:
        return list(pool.map(stop, runs))


def _was_cancelled(flow_run_id: UUID, logger: Any) -> bool:
    try:
        with quick_prefect_client() as client:
            return was_cancelled(client, flow_run_id)
    except Exception as error:
        logger.warning("Could not get the earlier states of this flow run: %s", error)
        return False


def _is_left_over(run: Run, prefixes: tuple[str, ...], *, crashed: bool) -> bool:
    marker = run.marker or ""
    if not marker.startswith(prefixes):
        return False
    if not crashed:
        return True
    # A container that is held after a failure ends by itself, and a user may have a shell in it.
    return not outlives_crash(marker) and not (run.holds_on_failure and run.is_held())


def _report(
    client: Client, found: dict[str, Run], stopped: set[str], flow_run_ids: list[UUID], logger: Any
) -> None:
    shown: dict[str, Unreported] = {}
    try:
        with quick_prefect_client() as api:
            shown = {run.run_id: run for run in _end_reports.unreported(api, flow_run_ids)}
    except Exception as error:
        logger.warning("Could not get the artifacts of this flow run: %s", error)
    awaited = [_end_reports.choose_report(shown, run) for run in found.values()]
    _end_reports.report_ends(client, awaited, timeout=END_SECONDS, stopped=stopped, logger=logger)
    # No wait for runs that this flow run only waited for, and those that ended before the hook ran.
    _end_reports.report_ends(client, shown.values(), timeout=0.0, logger=logger)
