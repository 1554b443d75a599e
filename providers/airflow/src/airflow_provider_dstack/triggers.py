"""Wait for a run in the triggerer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dstack._airflow_secrets import values_to_mask
from airflow_provider_dstack._callbacks import load_what_can_be, new_notifier
from airflow_provider_dstack._compat import trigger_has_on_kill
from airflow_provider_dstack._log_groups import LogGroups
from airflow_provider_dstack._log_relay import (
    DEFAULT_LOG_BUDGET,
    LogPosition,
    new_relay,
    position_and_status_in,
    position_in,
)
from airflow_provider_dstack._names import run_ref
from airflow_provider_dstack._outcome import broken_event, finished_event, timed_out_event
from airflow_provider_dstack._parameters import report_limits
from airflow_provider_dstack._run_reports import RunReports, StatePusher
from airflow_provider_dstack._stop import (
    KEEP_ASKED_FOR,
    OnKillAction,
    is_to_be_stopped,
    log_kept,
    stop_task_run,
)
from airflow_provider_dstack._threads import in_thread
from airflow_provider_dstack._trigger_relay import (
    Checkpoints,
    TriggerRelay,
    load,
    log_requests,
    save_and_rest,
)
from airflow_provider_dstack.hooks import DstackHook

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, Client, Event, Outcome
    from dstack_core.integration import CallbackNotifier, LogRelay, MaskEnv

# Airflow cancels on_kill again every second, and gives it up after [triggerer] on_kill_timeout, 30 s by
# default.
_ON_KILL_SECONDS = 29.0
# A stop mostly waits for replies. With fewer threads, hundreds of runs whose tasks end at once are stopped
# one after another, and the last of them may not be stopped before Airflow gives up.
_STOP_THREADS = 32
# The clocks of worker and triggerer may differ: without a limit, a task could wait for the difference.
_LONGEST_HOLD_SECONDS = 10.0
# Where hundreds of runs end at once, the last saves queue up. Their tasks do not wait longer than this for
# them; a triggerer that dies in that moment relays the last lines again.
_SAVE_LAST_SECONDS = 2.0
# Behind a flood of log its last records would be lost (see ``log_requests``): 2 s on a quiet machine.
_LOG_PASSES_SECONDS = 30.0


class DstackRunTrigger(BaseTrigger):
    """The follower of one run in the triggerer: it relays the log, and fires one event at the end.

    If the run ends while its log is still being relayed, the trigger fires at once, and the event holds the
    position where the worker continues. The position is saved in the XCom ``dstack_progress``, about a second
    after a line, and later where many tasks log or a run floods its log. A triggerer that takes over
    continues there. The event's payload is for ``DstackRunOperator.execute_complete``. No argument is a
    secret.

    Args:
        dstack_conn_id: As for ``DstackHook``.
        project_name: As for ``DstackHook``.
        run_name: The run's name.
        marker: What the run carries in ``configuration_path``; a run without it is another one.
        progress: What was followed already, as ``Progress.to_dict()`` returns it.
        tail: The last lines that were relayed already. Default: none.
        relayed_bytes: How many bytes of the log were relayed already. Default 0.
        left_out_bytes: How many bytes of the log the budget has left out already. Default 0.
        reported: What the run has reported already, as ``RunReports.state()`` returns it. Default: nothing.
        poll_interval: Seconds between two status requests. Default 5.
        retry_budget: Seconds to keep retrying an unreachable server. Default 600.
        deadline: When the run is stopped at the latest, in seconds since the epoch. Default: None, never.
        not_before: The earliest time of the event, in seconds since the epoch; the trigger waits for at most
            ten seconds. Default 0.
        get_logs: Relay the log. Default True.
        log_budget_bytes: The most bytes of the log to relay; the rest is counted and not relayed. None: all.
            Default 10 MB.
        log_timestamps: As for ``DstackRunOperator``. Default False.
        log_groups: As for ``DstackRunOperator``. Default False.
        relay_log_again: Add to the event where this trigger began in the log. Default False.
        on_kill_action: ``"stop"``, ``"abort"`` or ``"keep"``. Default ``"stop"``.
        max_report_bytes: As for ``DstackRunOperator``. Default: None.
        max_reports_per_second: As for ``DstackRunOperator``. Default: None.
        callbacks: The paths of the classes that are called; see ``DstackRunOperator``. Default: none.
        mask_env: As for ``DstackRunOperator``. Default ``"secrets"``.
        secret_names: The variables of the run's environment that Airflow keeps the values of as secrets;
            their names, not their values. Default: none.
        synced_sources: The templates of the project secrets that the run may print. Default: none.
        steps: For a task with ``fallbacks``, what ``_next_step`` needs once the run has ended; the event
            holds it, too. Default: None.

    Source: Airflow documentation, "Deferrable Operators & Triggers".
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
        reported: Mapping[str, Any] | None = None,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        deadline: float | None = None,
        not_before: float = 0.0,
        get_logs: bool = True,
        log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
        log_timestamps: bool = False,
        log_groups: bool = False,
        relay_log_again: bool = False,
        on_kill_action: OnKillAction = "stop",
        max_report_bytes: int | None = None,
        max_reports_per_second: int | None = None,
        callbacks: Sequence[str] = (),
        mask_env: MaskEnv = "secrets",
        secret_names: Sequence[str] = (),
        synced_sources: Mapping[str, str] | None = None,
        steps: Mapping[str, Any] | None = None,
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
        self.reported = dict(reported or {})
        self.poll_interval = poll_interval
        self.retry_budget = retry_budget
        self.deadline = deadline
        self.not_before = not_before
        self.get_logs = get_logs
        self.log_budget_bytes = log_budget_bytes
        self.log_timestamps = log_timestamps
        self.log_groups = log_groups
        self.relay_log_again = relay_log_again
        self.on_kill_action = on_kill_action
        self.max_report_bytes = max_report_bytes
        self.max_reports_per_second = max_reports_per_second
        self.callbacks = list(callbacks)
        self.mask_env = mask_env
        self.secret_names = list(secret_names)
        self.synced_sources = dict(synced_sources or {})
        self.steps = None if steps is None else dict(steps)
        self._fired = False
        self._last_save: asyncio.Future[None] | None = None
        self._last_save_seconds = _SAVE_LAST_SECONDS
        self._kill_arguments: dict[str, Any] | None = None
        # The token, and the values of project secrets.
        self._hidden: list[str] = []

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
                "reported": self.reported,
                "poll_interval": self.poll_interval,
                "retry_budget": self.retry_budget,
                "deadline": self.deadline,
                "not_before": self.not_before,
                "get_logs": self.get_logs,
                "log_budget_bytes": self.log_budget_bytes,
                "log_timestamps": self.log_timestamps,
                "log_groups": self.log_groups,
                "relay_log_again": self.relay_log_again,
                "on_kill_action": self.on_kill_action,
                "max_report_bytes": self.max_report_bytes,
                "max_reports_per_second": self.max_reports_per_second,
                "callbacks": self.callbacks,
                "mask_env": self.mask_env,
                "secret_names": self.secret_names,
                "synced_sources": self.synced_sources,
                "steps": self.steps,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the one event: the run has ended, the deadline passed, or the run could not be followed."""
        from dstack_core import clock

        try:
            payload = await self._until_deadline()
        except Exception as error:
            payload = broken_event(error)
            self.log.error("Run %s can no longer be followed: %s", self.run_name, payload["message"])
        # An event that comes before the scheduler has seen the deferral fails the task.
        await clock.asleep(min(max(0.0, self.not_before - clock.epoch()), _LONGEST_HOLD_SECONDS))
        if self._last_save is not None:
            # Else, if the triggerer dies before Airflow has the event, the last lines would be relayed again.
            await asyncio.wait([self._last_save], timeout=self._last_save_seconds)
        self._fired = True
        if self.relay_log_again:
            payload["again"] = self._first()
        if self.steps is not None:
            payload["steps"] = {**self.steps, "run_name": self.run_name}
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def on_kill(self) -> None:
        """Stop the run of a task that a user ended, unless ``on_kill_action`` is ``"keep"``.

        Airflow cancels this coroutine again every second; the stop continues regardless. Source: Airflow
        documentation, "Deferrable Operators & Triggers".
        """
        # Except for the rare take-over, only a user's action brings a trigger here.
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
        from dstack_core import clock

        left = None if self.deadline is None else max(0.0, self.deadline - clock.epoch())
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
        from dstack_core.integration import StepSums, counted_on, mask_result

        earlier = StepSums.from_dict(self.steps).count
        client, kept, callbacks = await in_thread(self._prepare)
        async with client:
            run = await client.runs.get(self.run_name)
            if run is None:
                raise RunNotFoundError(
                    f"Run {self.run_name} is no longer in project {client.project} on {client.server_url}: "
                    "it was deleted, so its outcome is unknown."
                )
            position = LogPosition.from_dict(kept)
            progress = position.progress
            log_relay = self._relay(run, kept)
            reports = RunReports(kept.get("reported"), log_relay.masker.mask)
            pusher = StatePusher(self.log)
            notifier = new_notifier(callbacks, self.task_instance, self.log, log_relay.masker.mask)
            notifier.follows(run, client.project)
            relay = TriggerRelay(
                log_relay,
                position,
                Checkpoints(
                    lambda take: self._start_save(take, relay, pusher),
                    kept,
                    # A callback, unlike a log line, may not take a status twice.
                    position=position_and_status_in if notifier else position_in,
                    is_flood=lambda: log_requests(relay.recent_bytes()) > 0,
                ),
                partial(self._wait_for_end, client, run.id),
                reports=reports,
                notify=partial(_notify, notifier),
                groups=LogGroups(self.log_groups),
                poll_interval=self.poll_interval,
            )
            events = run.follow(
                progress,
                poll_interval=self.poll_interval,
                # Another run that took the name would have other secrets to hide.
                logs=self.get_logs and progress.run_id in (None, run.id),
                retry_budget=self.retry_budget,
                report_limits=report_limits(self.max_report_bytes, self.max_reports_per_second),
                timestamps=self.log_timestamps,
                utilization=True,
            )
            # Its last reply is not needed again, and thousands of triggers may wait.
            del run
            try:
                async for own in events:
                    event = counted_on(own, earlier)
                    if not await relay.write(event, self.log) and relay.outcome is not None:
                        pusher.hurry()
                        self._last_save = relay.save_last()
                        await _finish_calls(notifier)
                        self.log.info(
                            "Run %s has ended. The worker relays the rest of its log.", self.run_name
                        )
                        return finished_event(relay.outcome, relay.tail, relay.state())
                    if isinstance(event, RunFinished):
                        self._save_last(relay, pusher)
                        # Airflow stores the event.
                        outcome = mask_result(event.outcome, log_relay.masker.mask, reports.note_secrets)
                        await _finish_calls(notifier)
                        return finished_event(
                            outcome,
                            relay.tail,
                            reported=reports.state(),
                            since=event.progress.since,
                            is_tail_shown=log_relay.shows_tail,
                            relayed=None if self.steps is None else _bytes_in(log_relay.state()),
                        )
            finally:
                await events.aclose()
                await relay.close()
        raise RuntimeError(f"following run {self.run_name} ended without an outcome")

    async def _wait_for_end(self, client: AsyncClient, run_id: str) -> Outcome | None:
        """Wait for the run's end; what the server does meanwhile is reported by the follower."""
        run = await client.runs.get(self.run_name, on_event=ignore)
        if run is None or run.id != run_id:
            return None
        return await run.wait(
            poll_interval=self.poll_interval, retry_budget=self.retry_budget, on_event=ignore
        )

    def _prepare(self) -> tuple[AsyncClient, dict[str, Any], list[Any]]:
        """Look up the connection and the position of an earlier trigger, which blocks; prepare for a kill."""
        kept: dict[str, Any] | None = None
        if self.task_instance is not None:
            # Also Airflow's first answer in a triggerer takes seconds, which a kill cannot spare.
            try:
                kept = load(self.task_instance, self.marker)
            except Exception as error:
                self.log.warning(
                    "Could not read the position in the run's log (%r). Log lines may repeat.", error
                )
        hook = DstackHook(self.dstack_conn_id, self.project_name)
        self._hidden = [hook.token, *values_to_mask(self.synced_sources, self.log)]
        # Thousands of triggers that wait need no client for that yet.
        self._kill_arguments = hook.client_arguments()
        client = hook.async_client(retry_budget=self.retry_budget)
        return client, {**self._first(), **(kept or {})}, load_what_can_be(self.callbacks, self.log)

    def _first(self) -> dict[str, Any]:
        """Return the position in the run's log at which the task was deferred."""
        return {
            "progress": self.progress,
            "tail": self.tail,
            "relayed_bytes": self.relayed_bytes,
            "left_out_bytes": self.left_out_bytes,
            "reported": self.reported,
        }

    def _relay(self, run: AsyncRun, kept: dict[str, Any]) -> LogRelay:
        from dstack_core.integration import collect_secrets

        return new_relay(
            tail=kept["tail"],
            relayed_bytes=kept["relayed_bytes"],
            left_out_bytes=kept["left_out_bytes"],
            log_budget_bytes=self.log_budget_bytes,
            url=run.url,
            # Airflow keeps every secret that it masks: in a triggerer they would pile up.
            secrets=collect_secrets(
                env=run.env,
                others=self._hidden,
                mask_env=self.mask_env,
                secret_names=self.secret_names,
            ),
        )

    @property
    def _run_id(self) -> str | None:
        run_id = self.progress.get("run_id")
        return None if run_id is None else str(run_id)

    def _save_last(self, relay: TriggerRelay, pusher: StatePusher) -> None:
        pusher.hurry()
        if log_requests(relay.recent_bytes()):
            self._last_save_seconds = _LOG_PASSES_SECONDS
        self._last_save = relay.save_last()

    def _start_save(
        self, take: Callable[[], dict[str, Any] | None], relay: TriggerRelay, pusher: StatePusher
    ) -> asyncio.Future[None]:
        ti = self.task_instance

        def work() -> None:
            try:
                if ti is not None and not self._fired and (state := take()) is not None:
                    push = partial(pusher.push, ti, state["reported"])
                    save_and_rest(ti, self.marker, state, relay.recent_bytes(), push)
            except Exception as error:
                self.log.warning("Could not save the position in the run's log: %r.", error)

        return in_thread(work, "checkpoint", 1)

    def _client_for_kill(self) -> Client:
        from dstack_core import Client

        if self._kill_arguments is None:
            return DstackHook(self.dstack_conn_id, self.project_name).client()
        return Client(**self._kill_arguments)

    def _stop(self) -> bool:
        """Stop the run; return whether nothing is left to stop. Takes the connection's timeout at most."""
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
        # A run that is kept needs no question. Before Airflow 3.3 the log line may also come from a triggerer
        # that ends.
        if self.on_kill_action == "keep" or is_to_be_stopped(
            self.task_instance, self.run_name, when_unknown=when_unknown, log=self.log
        ):
            self._stop()


def _bytes_in(state: Mapping[str, Any]) -> dict[str, int]:
    return {name: count for name, count in state.items() if name.endswith("_bytes")}


def _notify(notifier: CallbackNotifier, event: Event) -> None:
    """Call the callbacks, except for the end, which the worker reports once it has the whole log."""
    from dstack_core import RunFinished

    if not isinstance(event, RunFinished):
        notifier.handle(event)


async def _finish_calls(notifier: CallbackNotifier) -> None:
    """Wait until the callbacks have returned, so that the worker's calls come after them."""
    for pause in notifier.pauses():
        await asyncio.sleep(pause)


def ignore(event: Event) -> None:
    """Report nothing."""
