"""Find, judge and stop the runs that a flow run left running: for the hooks, the worker and the reaper.

The problem: a process that dies leaves runs that cost money. The processes that clean up know a flow run's
id, or nothing at all.

The idea: the markers on the runs name their flow run or task run, so the list of a project's runs is enough.
Hooks and worker stop the runs of one flow run (``stop_left_over``); the reaper asks Prefect for the owner of
each active run and stops those whose owner has ended (``Judge``).

The invariants: a run that Prefect does not know is left alone unless the caller wants otherwise; after a
crash, runs submitted with ``on_crash="keep"`` and runs that are held for a shell are left alone, unless a
cancellation was asked for before. A refused stop holds nothing up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack import _end_reports
from prefect_dstack._cancellation import quick_prefect_client, was_cancelled
from prefect_dstack._end_reports import Unreported
from prefect_dstack._followers import has_lost_its_follower
from prefect_dstack._names import flow_run_marker_prefix, outlives_crash, owner_of
from prefect_dstack._stop import BACKSTOP
from prefect_dstack.credentials import PATIENT_TIMEOUT, open_client

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

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
# No flow nests this deep; the limit ends a loop that a broken server would make.
_DEEPEST_SUBFLOW = 10
# A mapped task may have a hundred runs, and a busy server needs seconds for each stop. More at once load a
# server that is busy already.
_STOPS_AT_ONCE = 8
UNKNOWN_STATE = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """A run of this package that is active, or whose end was not reported, and what was done about it.

    ``owner`` is ``flow_run``, ``task_run`` or ``worker`` and the id of the flow or task run; ``state`` its
    state's name, ``"unknown"`` when this Prefect server has none. ``stopped`` (bool): the run was stopped, or
    would be without the dry run. ``reason`` (str) is why, or why not. ``failed`` (bool): the run had to be
    stopped, and the server did not confirm it.
    """

    run_name: str
    url: str
    owner: str
    state: str
    stopped: bool
    reason: str
    failed: bool = False


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


def with_subflows(flow_run_id: UUID, logger: Any) -> list[UUID]:
    """Return the flow run and its subflows; without the Prefect server only the flow run itself."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    found = [flow_run_id]
    parents = [flow_run_id]
    try:
        with quick_prefect_client(30.0) as client:
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
        logger.warning("Could not get the subflows of this flow run: %s", error)
    return found


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


class Judge:
    """The decisions about runs, by the states of their owners in Prefect."""

    def __init__(self, api: SyncPrefectClient, min_age: float, stop_unknown: bool) -> None:
        self._api = api
        self._min_age = min_age
        self._stop_unknown = stop_unknown

    def finding(self, run: Run) -> Finding:
        kind, owner_id = owner_of(run.marker) or ("", "")
        state = self.state(kind, owner_id)
        stopped, reason = self._verdict(run, kind, owner_id, state)
        # A cancellation also ends what a failure holds.
        if (
            stopped
            and state is not None
            and run.holds_on_failure
            and not self._was_cancelled(kind, owner_id, state)
            and run.is_held()
        ):
            stopped, reason = False, "its container is held for a shell (debug_on_failure)"
        name = UNKNOWN_STATE if state is None else str(state.name)
        return Finding(run.name, run.url, f"{kind}/{owner_id}", name, stopped, reason)

    def _verdict(self, run: Run, kind: str, owner_id: str, state: State[Any] | None) -> tuple[bool, str]:
        owner = "task run" if kind == "task_run" else "flow run"
        if state is None:
            return self._stop_unknown, f"this Prefect server does not know its {owner}"
        if not state.is_final():
            return False, f"its {owner} has not ended"
        age = _age(state)
        # The process, the hooks and the worker may be stopping it right now.
        if age < self._min_age:
            return False, f"its {owner} ended {age:.0f} s ago"
        # A cancellation stops also what a crash is to keep. A machine has nothing to do without its flow run.
        if (
            kind != "worker"
            and outlives_crash(run.marker or "")
            and not self._was_cancelled(kind, owner_id, state)
        ):
            return False, 'it was submitted with on_crash="keep"'
        if (
            (state.is_completed() or state.is_failed())
            and kind == "flow_run"
            and self._is_waited_for(owner_id)
        ):
            if not has_lost_its_follower(self._api, run.id, age):
                return False, "a task of its flow run still runs"
            return True, "its flow run has ended, and no process follows it"
        return True, f"its {owner} has ended"

    def has_ended(self, flow_run_id: str | None) -> bool:
        """Whether the flow run ended so long ago that it no longer reports anything itself."""
        if flow_run_id is None:
            return True
        state = self.state("flow_run", flow_run_id)
        return state is not None and state.is_final() and _age(state) >= self._min_age

    def state(self, kind: str, owner_id: str) -> State[Any] | None:
        """Return the state of a flow or task run, or None where Prefect does not know it."""
        from prefect.exceptions import ObjectNotFound

        try:
            if kind == "task_run":
                return self._api.read_task_run(UUID(owner_id)).state
            return self._api.read_flow_run(UUID(owner_id)).state
        except (ObjectNotFound, ValueError):
            return None

    def _was_cancelled(self, kind: str, owner_id: str, state: State[Any]) -> bool:
        """Whether the owner was cancelled, also if its process then crashed."""
        from prefect.exceptions import ObjectNotFound

        if state.is_cancelled() or kind == "task_run":
            return state.is_cancelled()
        try:
            return was_cancelled(self._api, UUID(owner_id))
        except ObjectNotFound:
            return False

    def _is_waited_for(self, flow_run_id: str) -> bool:
        """Whether the flow returned before its submitted tasks, which Prefect lets finish."""
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterId,
            TaskRunFilter,
            TaskRunFilterState,
            TaskRunFilterStateType,
        )
        from prefect.client.schemas.objects import StateType

        # Older clients want the name to be given, if only as None.
        running = TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING]), name=None)
        found = self._api.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)])),
            task_run_filter=TaskRunFilter(state=running),
            limit=1,
        )
        return bool(found)


def _age(state: State[Any]) -> float:
    # The clocks of this machine and the server may differ a little: no harm at this scale.
    return time.time() - state.timestamp.timestamp()
