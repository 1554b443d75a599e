"""Decide which runs and fleets of the project are left over, by the states of their owners in Prefect.

What Prefect does not know is left alone unless the caller wants otherwise, and so is what its owner may still
be stopping itself (``min_age``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack._cancellation import was_cancelled
from prefect_dstack._followers import has_lost_its_follower
from prefect_dstack._names import outlives_crash, owner_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

    from dstack_core import Run

UNKNOWN_STATE = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """A run of this package that is active, or whose end was not reported, and what was done about it.

    ``kind`` is ``"run"``, ``"fleet"`` or ``"secret"``; of the last two ``run_name`` is the name, and
    ``stopped`` means deleted. ``url`` is the page of the run or fleet; secrets have none: "".

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
    kind: str = "run"


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

    def owner_verdict(self, kind: str, state: State[Any] | None) -> tuple[bool, str]:
        """Return whether an owner in ``state`` needs nothing any more, and why, or why it may."""
        owner = "task run" if kind == "task_run" else "flow run"
        if state is None:
            return self._stop_unknown, f"this Prefect server does not know its {owner}"
        if not state.is_final():
            return False, f"its {owner} has not ended"
        age = _age(state)
        # The process, the hooks and the worker may be stopping it right now.
        if age < self._min_age:
            return False, f"its {owner} ended {age:.0f} s ago"
        return True, f"its {owner} has ended"

    def _verdict(self, run: Run, kind: str, owner_id: str, state: State[Any] | None) -> tuple[bool, str]:
        has_ended, reason = self.owner_verdict(kind, state)
        if state is None or not has_ended:
            return has_ended, reason
        # A cancellation stops also what a crash is to keep. A machine has nothing to do without its flow run.
        if (
            kind != "worker"
            and outlives_crash(run.marker or "")
            and not self._was_cancelled(kind, owner_id, state)
        ):
            return False, 'it was submitted with on_crash="keep"'
        if kind == "flow_run" and self.lets_tasks_finish(owner_id, state):
            if not has_lost_its_follower(self._api, run.id, _age(state)):
                return False, "a task of its flow run still runs"
            return True, "its flow run has ended, and no process follows it"
        return True, reason

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

    def lets_tasks_finish(self, flow_run_id: str, state: State[Any] | None) -> bool:
        """Whether the flow returned before its submitted tasks, which Prefect lets finish.

        A flow run that crashed or was cancelled has no process; task runs that a killed process leaves stay
        Running.
        """
        if state is None or not (state.is_completed() or state.is_failed()):
            return False
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
