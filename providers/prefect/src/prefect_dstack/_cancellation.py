"""Read from the Prefect server whether the flow run of a task was cancelled.

The problem: Prefect sends a signal to the process of a cancelled flow run, which reaches only its main
thread. A task that was submitted or mapped runs in another thread and learns nothing; after 30 s its process
is killed, and the run on dstack keeps running. Tasks of Dask and Ray, and plain scripts, get no signal
either.

The idea: while a task waits, it reads the state of its flow run and of its parent flow runs every 5 s. A
private event of the task runner makes it read at once; without it everything works, only later. The event
alone is not enough: it is also set when the flow function returned while submitted tasks were running, and
Prefect lets these finish. So an interrupt counts only together with the state.

The invariants: a Prefect server that does not answer stops nothing and prevents no submission; what ends
a task is a ``BaseException`` (``StopRequested``), since Prefect retries a task after an ``Exception``.

Measured with Prefect 3.8.8: the event shows a cancellation within 0.3 to 1.0 s, the state alone within one
interval; a request takes about 10 ms and the connection 0.07 s of CPU, so it is kept open.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.context import FlowRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

# A wait is cut into slices of this length: Prefect's time limit reaches a thread only between two of them
# (measured: a sleep of 12 s ended a limit of 3 s after 12 s), and each slice asks whether the probe is due.
SLICE_SECONDS = 0.5
# Prefect kills the process 30 s after the cancellation, and a stop has 22 s of that: a longer pause leaves
# too little time to notice, a shorter one only costs the Prefect server more requests.
CHECK_SECONDS = 5.0
# Once the private event is set, the answer is urgent. But a flow that merely returned is polled this often
# until its submitted tasks have ended, so this must not be much shorter.
_RECHECK_SECONDS = 1.0
# As long as a check itself may take, so that one slow reply costs no more than one pause.
_REQUEST_SECONDS = 5.0
# Artifacts and states are not worth a longer wait; a run's end is.
_PREFECT_SECONDS = 5.0
# No flow nests this deep; the limit ends a loop of parents that a broken server would make.
_DEEPEST_PARENT = 20


class StopRequested(BaseException):
    """A request to stop, because the flow run has ended or is about to; Prefect does not retry after it.

    ``cancelled`` (bool): the flow run was cancelled or timed out; otherwise its process was interrupted.
    ``timed_out`` (bool): its time limit passed, so that nothing kills the process.
    """

    def __init__(self, reason: str, *, cancelled: bool, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cancelled = cancelled
        self.timed_out = timed_out


def verdict(state: State[Any] | None, *, interrupted: bool) -> StopRequested | None:
    """Return why the tasks of a flow run in ``state`` have to stop, or None.

    ``interrupted`` alone means nothing: the task runner ends also when the flow function returned or
    raised while tasks were running, and these are allowed to finish.
    """
    if state is None:
        return None
    if state.is_cancelling() or state.is_cancelled():
        return StopRequested("the flow run was cancelled", cancelled=True)
    # A flow that failed by itself lets its tasks finish; one whose time limit passed does not.
    if interrupted and _has_timed_out(state):
        return StopRequested("the flow run timed out", cancelled=True, timed_out=True)
    # The server still shows Running while Ctrl-C or a SIGTERM ends the process.
    if interrupted and (state.is_running() or state.is_crashed()):
        return StopRequested("the process of the flow run was interrupted", cancelled=False)
    return None


def verdict_before_submit(state: State[Any] | None) -> StopRequested | None:
    """Return why nothing may be submitted for a flow run in ``state``, or None.

    A flow that completed may have returned before the tasks that it submitted; Prefect lets these finish.
    """
    if state is None or not (state.is_cancelling() or state.is_final()) or state.is_completed():
        return None
    name = "was cancelled" if state.is_cancelling() or state.is_cancelled() else f"is {state.name}"
    return StopRequested(f"the flow run {name}", cancelled=True, timed_out=_has_timed_out(state))


def _has_timed_out(state: State[Any]) -> bool:
    return state.is_failed() and state.name == "TimedOut"


def was_cancelled(api: SyncPrefectClient, flow_run_id: UUID) -> bool:
    """Return whether a cancellation of a flow run or of a parent of it was asked for, however it ended.

    A process that a signal ends while its flow run is Cancelling reports a crash, and the state then shows
    nothing of the cancellation. One of an earlier execution does not count. Raises what the client raises.
    """
    for _ in range(_DEEPEST_PARENT):
        if _ends_cancelled(api.read_flow_run_states(flow_run_id)):
            return True
        parent_task_run_id = api.read_flow_run(flow_run_id).parent_task_run_id
        if parent_task_run_id is None:
            return False
        parent = api.read_task_run(parent_task_run_id).flow_run_id
        if parent is None:
            return False
        flow_run_id = parent
    return False


def _ends_cancelled(states: list[State[Any]]) -> bool:
    for state in sorted(states, key=lambda state: state.timestamp, reverse=True):
        if state.is_cancelling() or state.is_cancelled():
            return True
        if not state.is_final():
            return False
    return False


@contextmanager
def quick_prefect_client(seconds: float = _PREFECT_SECONDS) -> Iterator[SyncPrefectClient]:
    """Open a client of the Prefect server that waits ``seconds`` for a reply and retries nothing."""
    from prefect.client.orchestration import get_client

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": seconds}, sync_client=True) as client,
    ):
        yield client


class CancelProbe:
    """A periodic check of whether the flow run was cancelled; errors of the Prefect server are ignored.

    ``read_states`` returns the states of the flow run and its parents; by default it is made on first use.
    ``has_ended`` (bool): the flow run had ended when it was asked for last.
    """

    def __init__(
        self,
        flow_run_id: str | None,
        task_runner: Any,
        *,
        read_states: Callable[[], Iterator[State[Any] | None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flow_run_id = flow_run_id
        self._task_runner = task_runner
        self._reader = FlowRunReader(flow_run_id) if flow_run_id and read_states is None else None
        self._read_states = self._reader or read_states
        self._clock = clock
        self._asked_at = clock()
        self.has_ended = False

    @property
    def is_due(self) -> bool:
        """Whether it is time to ``ask``; makes no request."""
        if self._read_states is None:
            return False
        pause = _RECHECK_SECONDS if is_interrupted(self._task_runner) else CHECK_SECONDS
        return self._clock() - self._asked_at >= pause

    def ask(self) -> StopRequested | None:
        """Return why to stop, or None; takes up to 5 s per flow run when the server does not answer."""
        interrupted, is_first = is_interrupted(self._task_runner), True

        def judge(state: State[Any] | None) -> StopRequested | None:
            # Only the first state is that of the interrupted process: a parent has a process of its own.
            nonlocal interrupted, is_first
            if is_first:
                is_first, self.has_ended = False, state is not None and state.is_final()
            request, interrupted = verdict(state, interrupted=interrupted), False
            return request

        return self._first(judge)

    def ask_before_submit(self) -> StopRequested | None:
        """Return why nothing may be submitted, or None, also where the Prefect server does not answer."""
        return self._first(verdict_before_submit)

    def _first(self, judge: Callable[[State[Any] | None], StopRequested | None]) -> StopRequested | None:
        """Return the first request that ``judge`` makes of the flow run or its parents."""
        if self._read_states is None:
            return None
        try:
            for state in self._read_states():
                if (request := judge(state)) is not None:
                    return request
        except Exception:
            # The task outlives an outage of the Prefect server; the next check asks again.
            return None
        finally:
            # Counted from the reply, so that a slow server is not asked without a pause.
            self._asked_at = self._clock()
        return None

    def close(self) -> None:
        """Close the connection to the Prefect server."""
        if self._reader is not None:
            self._reader.close()


class FlowRunReader:
    """The states of a flow run, its parent flow run, and so on, read with one client."""

    def __init__(self, flow_run_id: str) -> None:
        self._ids: list[UUID] = [UUID(flow_run_id)]
        self._complete = False
        self._client: SyncPrefectClient | None = None
        # The client's own retries would delay the wait for long; a context of its own keeps the setting
        # away from the task, and entering it once is cheaper than once per request.
        self._context = contextvars.copy_context()
        self._stack = ExitStack()

    def __call__(self) -> Iterator[State[Any] | None]:
        """Yield the state of the flow run first, then its parents'. Raises what the client raises."""
        for position in range(_DEEPEST_PARENT):
            if position >= len(self._ids):
                return
            run = self._context.run(self._read, self._ids[position])
            yield run.state
            # The parents of a flow run never change: each is found once, and only its state is read again.
            if not self._complete and position == len(self._ids) - 1:
                if run.parent_task_run_id is None:
                    self._complete = True
                else:
                    self._ids.append(self._context.run(self._flow_run_of, run.parent_task_run_id))

    def close(self) -> None:
        """Close the client."""
        self._client = None
        self._context.run(self._stack.close)

    def _read(self, flow_run_id: UUID) -> Any:
        return self._open().read_flow_run(flow_run_id)

    def _flow_run_of(self, task_run_id: UUID) -> UUID:
        flow_run_id = self._open().read_task_run(task_run_id).flow_run_id
        if flow_run_id is None:
            raise LookupError(f"task run {task_run_id} has no flow run")
        return flow_run_id

    def _open(self) -> SyncPrefectClient:
        if self._client is None:
            from prefect.client.orchestration import get_client

            self._stack.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))
            client = get_client(httpx_settings={"timeout": _REQUEST_SECONDS}, sync_client=True)
            self._client = self._stack.enter_context(client)
        return self._client


def current_task_runner() -> Any:
    """Return the task runner of the flow run in this context, or None."""
    context = FlowRunContext.get()
    return context.task_runner if context is not None else None


def is_interrupted(task_runner: Any) -> bool:
    """Return whether the flow's task runner is ending while its tasks still run.

    The events are private to Prefect and only speed things up, so each access allows for their absence. Any
    event counts, not only this task's own: a task called inside a submitted one has none.
    """
    events = getattr(task_runner, "_cancel_events", None)
    try:
        return any(event.is_set() for event in list(events.values())) if events else False
    except Exception:
        return False
