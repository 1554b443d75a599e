"""Wait for a run in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dstack._checkpoint import Checkpoints, load, log_requests, save_and_rest
from airflow_provider_dstack._compat import trigger_has_on_kill
from airflow_provider_dstack._log_position import LogPosition
from airflow_provider_dstack._names import run_ref
from airflow_provider_dstack._outcome import broken_event, finished_event, timed_out_event
from airflow_provider_dstack._relay import DEFAULT_LOG_BUDGET, new_relay
from airflow_provider_dstack._stop import (
    KEEP_ASKED_FOR,
    OnKillAction,
    is_to_be_stopped,
    log_kept,
    stop_task_run,
)
from airflow_provider_dstack._threads import in_thread
from airflow_provider_dstack._watch import Watch
from airflow_provider_dstack.hooks import DstackHook

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, Client, Event, Outcome
    from dstack_core.integration import LogRelay

# Airflow cancels on_kill again every second, and gives it up after [triggerer] on_kill_timeout, 30 s by
# default.
_ON_KILL_SECONDS = 29.0
# A stop mostly waits for replies; hundreds of tasks that are ended at once must all be stopped at once.
_STOP_THREADS = 32
# The clocks of worker and triggerer may differ.
_LONGEST_HOLD_SECONDS = 10.0
# Where hundreds of runs end at once, their tasks go on before it is kept that all was told.
_KEEP_LAST_SECONDS = 2.0
# Behind a flood of log its last records would be lost (see ``log_requests``): 2 s on a quiet machine.
_LOG_PASSES_SECONDS = 30.0


class DstackRunTrigger(BaseTrigger):
    """Follow a run to its end, relay its log, and fire one event.

    ``dstack_conn_id``, ``project_name``: as for ``DstackHook``; no secret is kept. ``run_name``,
    ``marker`` (str) say which run it is, ``progress`` (``Progress.to_dict()``) how far it was followed,
    ``tail`` (list of str) are the last lines already relayed, ``relayed_bytes`` and ``left_out_bytes`` how
    much of the log was and was not. ``poll_interval`` and ``retry_budget`` in seconds, ``deadline`` in
    seconds since the epoch or None: the run is stopped then. Before ``not_before``, also since the epoch,
    there is no event, but for at most ten seconds. ``get_logs`` (bool), ``log_budget_bytes``:
    what is longer is counted and not relayed; None relays all. ``on_kill_action``: ``"stop"``, ``"abort"``
    or ``"keep"``. The event's payload is for ``DstackRunOperator.execute_complete``.

    If the run ends while its log is still being relayed, it fires at once, and the event says where the
    worker continues. How far it came is kept every ten seconds in the XCom ``dstack_progress``; a triggerer
    that takes over goes on there. Source: Airflow documentation, "Deferrable Operators & Triggers".
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
        relayed_bytes: int = 0,
        left_out_bytes: int = 0,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        deadline: float | None = None,
        not_before: float = 0.0,
        get_logs: bool = True,
        log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
        on_kill_action: OnKillAction = "stop",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.run_name = run_name
        self.marker = marker
        self.progress = dict(progress)
        self.tail = list(tail)
        self.relayed_bytes = relayed_bytes
        self.left_out_bytes = left_out_bytes
        self.poll_interval = poll_interval
        self.retry_budget = retry_budget
        self.deadline = deadline
        self.not_before = not_before
        self.get_logs = get_logs
        self.log_budget_bytes = log_budget_bytes
        self.on_kill_action = on_kill_action
        self._fired = False
        self._last_kept: asyncio.Future[None] | None = None
        self._last_seconds = _KEEP_LAST_SECONDS
        self._kill_arguments: dict[str, Any] | None = None
        self._token: str | None = None

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
                "relayed_bytes": self.relayed_bytes,
                "left_out_bytes": self.left_out_bytes,
                "poll_interval": self.poll_interval,
                "retry_budget": self.retry_budget,
                "deadline": self.deadline,
                "not_before": self.not_before,
                "get_logs": self.get_logs,
                "log_budget_bytes": self.log_budget_bytes,
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
        # An event that comes before the scheduler has seen the deferral fails the task.
        await asyncio.sleep(min(max(0.0, self.not_before - time.time()), _LONGEST_HOLD_SECONDS))
        if self._last_kept is not None:
            # Else a triggerer that dies before Airflow has the event would have the last lines told again.
            await asyncio.wait([self._last_kept], timeout=self._last_seconds)
        self._fired = True
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def on_kill(self) -> None:
        """Stop the run of a task that a user ended, unless ``on_kill_action`` is ``"keep"``.

        Airflow cancels this coroutine again every second; the stop goes on regardless. Source: Airflow
        documentation, "Deferrable Operators & Triggers".
        """
        # Only a user's action brings a trigger here, but for the rare take-over.
        await self._kill(when_unknown="stop")

    async def cleanup(self) -> None:
        """Do the work of ``on_kill`` on Airflow before 3.3, which does not call that; else nothing."""
        if not trigger_has_on_kill():
            # A triggerer that ends comes here too, and its supervisor may be gone already.
            await self._kill(when_unknown="leave")

    async def _kill(self, when_unknown: Literal["stop", "leave"]) -> None:
        if self._fired:
            return
        loop = asyncio.get_running_loop()
        stopping = in_thread(lambda: self._stop_if_ended(when_unknown), "stop", _STOP_THREADS)
        deadline = loop.time() + _ON_KILL_SECONDS
        while not stopping.done() and loop.time() < deadline:
            try:
                await asyncio.wait([stopping], timeout=deadline - loop.time())
            except asyncio.CancelledError:
                continue

    async def _until_deadline(self) -> dict[str, Any]:
        left = None if self.deadline is None else max(0.0, self.deadline - time.time())
        limit = asyncio.timeout(left)
        try:
            async with limit:
                return await self._follow()
        except TimeoutError:
            if not limit.expired():
                raise
            self.log.error("execution_timeout passed before run %s ended.", self.run_name)
            return timed_out_event(await in_thread(self._stop, "stop", _STOP_THREADS))

    async def _follow(self) -> dict[str, Any]:
        from dstack_core import RunFinished, RunNotFoundError

        client, kept = await in_thread(self._prepare)
        async with client:
            run = await client.runs.get(self.run_name)
            if run is None:
                raise RunNotFoundError(
                    f"the run {self.run_name} is no longer in project {client.project} on "
                    f"{client.server_url}; somebody deleted it, so its outcome cannot be told"
                )
            position = LogPosition.from_dict(kept)
            progress = position.progress
            watch = Watch(
                self._relay(run, kept),
                position,
                Checkpoints(lambda state: self._start_save(state, watch.recent_bytes()), kept),
                partial(self._wait_for_end, client, run.id),
                poll_interval=self.poll_interval,
            )
            events = run.follow(
                progress,
                poll_interval=self.poll_interval,
                # Another run that took the name would have other secrets to hide.
                logs=self.get_logs and progress.run_id in (None, run.id),
                retry_budget=self.retry_budget,
            )
            # What it says of the run is not needed again, and thousands may wait.
            del run
            try:
                async for event in events:
                    if not await watch.tell(event, self.log) and watch.outcome is not None:
                        self._last_kept = watch.keep_last()
                        self.log.info(
                            "Run %s has ended. The worker relays the rest of its log.", self.run_name
                        )
                        return finished_event(watch.outcome, watch.relay.tail, watch.state())
                    if isinstance(event, RunFinished):
                        self._keep_last(watch)
                        return finished_event(event.outcome, watch.relay.tail)
            finally:
                await events.aclose()
                await watch.close()
        raise RuntimeError(f"following run {self.run_name} ended without an outcome")

    async def _wait_for_end(self, client: AsyncClient, run_id: str) -> Outcome | None:
        """Wait for the run's end; what the server does meanwhile is reported by the follower."""
        run = await client.runs.get(self.run_name, on_event=_ignore)
        if run is None or run.id != run_id:
            return None
        return await run.wait(
            poll_interval=self.poll_interval, retry_budget=self.retry_budget, on_event=_ignore
        )

    def _prepare(self) -> tuple[AsyncClient, dict[str, Any]]:
        """Look up the connection and how far an earlier trigger came, which blocks; prepare for a kill."""
        kept: dict[str, Any] | None = None
        if self.task_instance is not None:
            # Also Airflow's first answer in a triggerer takes seconds, which a kill cannot spare.
            try:
                kept = load(self.task_instance, self.marker)
            except Exception as error:
                self.log.warning(
                    "How far the run was followed cannot be told (%r); log lines may repeat", error
                )
        hook = DstackHook(self.dstack_conn_id, self.project_name)
        self._token = hook.token
        # Thousands of triggers that wait need no client for that yet.
        self._kill_arguments = hook.client_arguments()
        first = {
            "progress": self.progress,
            "tail": self.tail,
            "relayed_bytes": self.relayed_bytes,
            "left_out_bytes": self.left_out_bytes,
        }
        return hook.async_client(retry_budget=self.retry_budget), {**first, **(kept or {})}

    def _relay(self, run: AsyncRun, kept: dict[str, Any]) -> LogRelay:
        from dstack_core.integration import collect_secrets

        return new_relay(
            tail=kept["tail"],
            relayed_bytes=kept["relayed_bytes"],
            left_out_bytes=kept["left_out_bytes"],
            log_budget_bytes=self.log_budget_bytes,
            url=run.url,
            # Airflow forgets no secret it was told to hide: in a triggerer they would pile up.
            secrets=collect_secrets(env=run.env, others=[self._token]),
        )

    @property
    def _run_id(self) -> str | None:
        run_id = self.progress.get("run_id")
        return None if run_id is None else str(run_id)

    def _keep_last(self, watch: Watch) -> None:
        if log_requests(watch.recent_bytes()):
            self._last_seconds = _LOG_PASSES_SECONDS
        self._last_kept = watch.keep_last()

    def _start_save(self, state: dict[str, Any], recent_bytes: float) -> asyncio.Future[None]:
        ti = self.task_instance

        def work() -> None:
            try:
                if ti is not None and not self._fired:
                    save_and_rest(ti, self.marker, state, recent_bytes)
            except Exception as error:
                self.log.warning("How far the run was followed cannot be kept: %r", error)

        return in_thread(work, "checkpoint", 1)

    def _client_for_kill(self) -> Client:
        from dstack_core import Client

        if self._kill_arguments is None:
            return DstackHook(self.dstack_conn_id, self.project_name).client()
        return Client(**self._kill_arguments)

    def _stop(self) -> bool:
        """Stop the run; tell whether nothing is left to stop. Takes the connection's timeout at most."""
        with self._client_for_kill() as client:
            if self.on_kill_action == "keep":
                log_kept(self.run_name, KEEP_ASKED_FOR, client.run_url(self._run_id), self.log)
                return True
            result = stop_task_run(
                client,
                run_ref(self.run_name, self.marker),
                run_id=self._run_id,
                action=self.on_kill_action,
                log=self.log,
            )
        return result.is_safe

    def _stop_if_ended(self, when_unknown: Literal["stop", "leave"]) -> None:
        # A run that is kept needs no question; before Airflow 3.3 a triggerer that ends may say so, too.
        if self.on_kill_action == "keep" or is_to_be_stopped(
            self.task_instance, self.run_name, when_unknown=when_unknown, log=self.log
        ):
            self._stop()


def _ignore(event: Event) -> None:
    """Report nothing."""
