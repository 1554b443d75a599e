"""Wait for a run in the triggerer."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dstack._compat import task_state, trigger_has_on_kill
from airflow_provider_dstack._outcome import broken_event, finished_event, timed_out_event
from airflow_provider_dstack._relay import Relay
from airflow_provider_dstack._stop import KILL_LIMITS, OnKillAction, stop_patiently, stop_unless_deferred
from airflow_provider_dstack.hooks import DstackHook

if TYPE_CHECKING:
    from dstack_core import AsyncClient, Client

T = TypeVar("T")

_ON_KILL_SECONDS = 25.0
# The loop itself holds its tasks weakly.
_STOPPING: set[asyncio.Future[None]] = set()


class DstackRunTrigger(BaseTrigger):
    """Follow a run to its end, relay its log, and fire one event.

    ``dstack_conn_id``, ``project_name``: as for ``DstackHook``; no secret is kept. ``run_name``,
    ``marker`` (str) say which run it is, ``progress`` (``Progress.to_dict()``) how far it was followed,
    ``tail`` (list of str) are the last lines already relayed. ``poll_interval`` and ``retry_budget`` in
    seconds, ``deadline`` in seconds since the epoch or None: the run is stopped then. ``get_logs`` (bool).
    ``on_kill_action``: ``"stop"``, ``"abort"`` or ``"keep"``. The event's payload is for
    ``DstackRunOperator.execute_complete``. Source: Airflow documentation, "Deferrable Operators & Triggers".
    """

    def __init__(
        self,
        *,
        dstack_conn_id: str,
        project_name: str | None,
        run_name: str,
        marker: str,
        progress: Mapping[str, Any],
        tail: Sequence[str] = (),
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        deadline: float | None = None,
        get_logs: bool = True,
        on_kill_action: OnKillAction = "stop",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.run_name = run_name
        self.marker = marker
        self.progress = dict(progress)
        self.tail = list(tail)
        self.poll_interval = poll_interval
        self.retry_budget = retry_budget
        self.deadline = deadline
        self.get_logs = get_logs
        self.on_kill_action = on_kill_action
        self._fired = False
        self._kill_client: Client | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments to make this trigger again in another process."""
        return (
            "airflow_provider_dstack.triggers.DstackRunTrigger",
            {
                "dstack_conn_id": self.dstack_conn_id,
                "project_name": self.project_name,
                "run_name": self.run_name,
                "marker": self.marker,
                "progress": self.progress,
                "tail": self.tail,
                "poll_interval": self.poll_interval,
                "retry_budget": self.retry_budget,
                "deadline": self.deadline,
                "get_logs": self.get_logs,
                "on_kill_action": self.on_kill_action,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the one event: the run is over, the deadline passed, or the run could not be followed."""
        try:
            payload = await self._until_deadline()
        except Exception as error:
            payload = broken_event(error)
            self.log.error("Run %s can no longer be followed: %s", self.run_name, payload["message"])
        self._fired = True
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def on_kill(self) -> None:
        """Stop the run of a task that a user ended, unless ``on_kill_action`` is ``"keep"``.

        Airflow cancels this coroutine again every second; the stop goes on regardless. Source: Airflow
        documentation, "Deferrable Operators & Triggers".
        """
        if self._fired or self.on_kill_action == "keep":
            return
        loop = asyncio.get_running_loop()
        stopping = _in_thread(self._stop_if_ended)
        _STOPPING.add(stopping)
        stopping.add_done_callback(_STOPPING.discard)
        deadline = loop.time() + _ON_KILL_SECONDS
        while not stopping.done() and loop.time() < deadline:
            try:
                await asyncio.wait([stopping], timeout=deadline - loop.time())
            except asyncio.CancelledError:
                continue

    async def cleanup(self) -> None:
        """Do the work of ``on_kill`` on Airflow before 3.3, which does not call that; else nothing."""
        if not trigger_has_on_kill():
            await DstackRunTrigger.on_kill(self)

    async def _until_deadline(self) -> dict[str, Any]:
        left = None if self.deadline is None else max(0.0, self.deadline - time.time())
        limit = asyncio.timeout(left)
        try:
            async with limit:
                return await self._follow()
        except TimeoutError:
            if not limit.expired():
                raise
            self.log.error("execution_timeout passed while run %s was going", self.run_name)
            return timed_out_event(await _in_thread(self._stop))

    async def _follow(self) -> dict[str, Any]:
        from dstack_core import Progress, RunFinished, RunNotFoundError

        async with await _in_thread(self._connect) as client:
            run = await client.runs.get(self.run_name)
            if run is None:
                raise RunNotFoundError(
                    f"the run {self.run_name} is no longer in project {client.project} on "
                    f"{client.server_url}; somebody deleted it, so its outcome cannot be told"
                )
            relay = Relay(self.tail)
            events = run.follow(
                Progress.from_dict(self.progress),
                poll_interval=self.poll_interval,
                logs=self.get_logs,
                retry_budget=self.retry_budget,
            )
            async for event in events:
                for level, text in relay.records(event):
                    self.log.log(level, text)
                    # A record goes to the triggerer's supervisor; a flood of them must not starve the loop.
                    await asyncio.sleep(0)
                if isinstance(event, RunFinished):
                    return finished_event(event.outcome, relay.tail)
        raise RuntimeError(f"following run {self.run_name} ended without an outcome")

    def _connect(self) -> AsyncClient:
        """Look the connection up, which blocks; prepare for a kill while there is time."""
        if self.task_instance is not None:
            # A triggerer takes seconds for the first question of its life, which a kill cannot spare.
            with suppress(Exception):
                task_state(self.task_instance)
        hook = DstackHook(self.dstack_conn_id, self.project_name)
        self._kill_client = hook.client(**KILL_LIMITS)
        return hook.async_client(retry_budget=self.retry_budget)

    def _client_for_kill(self) -> Client:
        if self._kill_client is None:
            self._kill_client = DstackHook(self.dstack_conn_id, self.project_name).client(**KILL_LIMITS)
        return self._kill_client

    def _stop(self) -> bool:
        if self.on_kill_action == "keep":
            return True
        abort = self.on_kill_action == "abort"
        return stop_patiently(self._client_for_kill(), self.run_name, self.marker, abort=abort, log=self.log)

    def _stop_if_ended(self) -> None:
        abort = self.on_kill_action == "abort"
        stop_unless_deferred(
            self.task_instance, self._client_for_kill, self.run_name, self.marker, abort=abort, log=self.log
        )


@cache
def _threads() -> ThreadPoolExecutor:
    """Return the threads that all triggers of this process share, made when the first one needs them."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="dstack-trigger")


def _in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run ``function`` in a thread of this module's own; its log reaches the task's."""
    context = contextvars.copy_context()
    return asyncio.get_running_loop().run_in_executor(_threads(), lambda: context.run(function))
