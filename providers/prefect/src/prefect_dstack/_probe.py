"""Read whether the flow run was cancelled: for tasks that no signal reaches, and before a submission."""

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

# How long a wait lasts before the probe is asked whether it is due.
SLICE_SECONDS = 0.5
CHECK_SECONDS = 5.0
_RECHECK_SECONDS = 1.0
_REQUEST_SECONDS = 5.0
# An artifact or a state is not worth waiting longer for: a run's end is.
_PREFECT_SECONDS = 5.0


class StopRequested(BaseException):
    """The flow run has ended, or is about to; not an ``Exception``, after which Prefect retries a task.

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
    if interrupted and _has_timed_out(state):
        return StopRequested("the flow run timed out", cancelled=True, timed_out=True)
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
    """Reads the state of the flow run now and then; errors of the Prefect server are ignored.

    ``read_states`` returns the states of the flow run and its parents and is made on first use.
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

    @property
    def is_due(self) -> bool:
        """Whether it is time to ``ask``; makes no request."""
        if self._read_states is None:
            return False
        pause = _RECHECK_SECONDS if is_interrupted(self._task_runner) else CHECK_SECONDS
        return self._clock() - self._asked_at >= pause

    def ask(self) -> StopRequested | None:
        """Return why to stop, or None; takes up to 5 s per flow run when the server does not answer."""
        interrupted = is_interrupted(self._task_runner)

        def judge(state: State[Any] | None) -> StopRequested | None:
            nonlocal interrupted
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
            return None
        finally:
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
        for position in range(20):
            if position >= len(self._ids):
                return
            run = self._context.run(self._read, self._ids[position])
            yield run.state
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
    """Tell whether the flow's task runner is ending while its tasks still run.

    Any event counts, not only this task's own: a task called inside a submitted one has none.
    """
    events = getattr(task_runner, "_cancel_events", None)
    try:
        return any(event.is_set() for event in list(events.values())) if events else False
    except Exception:
        return False
