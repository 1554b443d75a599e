"""Find out whether the flow run was cancelled, for tasks that no signal reaches."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.context import FlowRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_dstack._interrupted import is_interrupted

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

CHECK_SECONDS = 5.0
_RECHECK_SECONDS = 1.0
_REQUEST_SECONDS = 5.0


class StopRequested(BaseException):
    """Leave the wait because the flow run is over; no ``Exception``, for Prefect would retry the task.

    ``cancelled`` tells whether somebody cancelled the flow run, else its process was interrupted.
    """

    def __init__(self, reason: str, *, cancelled: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cancelled = cancelled


def verdict(state: State[Any] | None, *, interrupted: bool) -> StopRequested | None:
    """Tell whether a flow run in ``state`` wants its tasks stopped.

    ``interrupted`` alone says nothing: the task runner ends also when the flow function returned or
    raised while tasks were running, and these are allowed to finish.
    """
    if state is None:
        return None
    if state.is_cancelling() or state.is_cancelled():
        return StopRequested("the flow run was cancelled", cancelled=True)
    if interrupted and state.is_failed() and state.name == "TimedOut":
        return StopRequested("the flow run timed out", cancelled=True)
    if interrupted and (state.is_running() or state.is_crashed()):
        return StopRequested("the process of the flow run was interrupted", cancelled=False)
    return None


class CancelProbe:
    """Ask now and then how the flow run is; errors of the Prefect server are borne in silence.

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
        """Tell whether it is time to ``ask``; costs nothing."""
        if self._read_states is None:
            return False
        pause = _RECHECK_SECONDS if is_interrupted(self._task_runner) else CHECK_SECONDS
        return self._clock() - self._asked_at >= pause

    def ask(self) -> StopRequested | None:
        """Return why to stop, or None; takes up to 5 s a flow run when the server is silent."""
        if self._read_states is None:
            return None
        interrupted = is_interrupted(self._task_runner)
        try:
            for state in self._read_states():
                if (request := verdict(state, interrupted=interrupted)) is not None:
                    return request
                interrupted = False
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
    """Read the states of a flow run, its parent flow run, and so on, with one kept client."""

    def __init__(self, flow_run_id: str) -> None:
        self._ids: list[UUID] = [UUID(flow_run_id)]
        self._complete = False
        self._client: SyncPrefectClient | None = None
        # The client's own retries would hold up the wait for long; a context of its own keeps the
        # setting away from the task, and entering it once is cheaper than once a request.
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
