"""Relay on a worker what a trigger left of the log of a run that has ended.

The problem: a trigger relays about 100 kB/s, a worker hundreds of thousands of lines a second, and the end of
a task does not wait for the former (see ``_trigger_relay``). But Airflow calls ``on_kill`` in a signal
handler of the main thread, and if the main thread is interrupted while it holds the lock of a logger, the
handler waits for that lock until the process is killed.

The idea: the work is done in a thread while the main thread sleeps. There is nothing to stop: the run has
ended, and its outcome is known.

Invariants: each line is relayed once, from the position in the trigger's event on, and each message that the
run reports is received once; the outcome in the event lacks those, so the one that is read here replaces it.
An error costs the task some time and the rest of the log, and never its outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import mask_secret
from airflow_provider_dstack._log_groups import LogGroups
from airflow_provider_dstack._log_relay import LogPosition, new_relay, records
from airflow_provider_dstack._threads import start_thread
from airflow_provider_dstack.errors import DstackRunInterrupted

if TYPE_CHECKING:
    from airflow_provider_dstack._run_reports import RunReports
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import Client, Event, Outcome, Progress, ReportLimits, Run
    from dstack_core.integration import CallbackNotifier, LogRelay

# The log can be read later on the run's page, the result is wanted now. A longer time delays the result by as
# much if the server is unreachable.
_RETRY_SECONDS = 60.0
# How late a kill is seen, of the 5 s that Airflow leaves.
_TICK_SECONDS = 0.05


def relay_remaining_log(
    event: Mapping[str, Any],
    outcome: Outcome | None,
    reports: RunReports,
    *,
    run_name: str,
    url: str | None,
    hook: DstackHook,
    secrets: Iterable[str],
    collect: Callable[..., list[str]],
    log_budget_bytes: int | None,
    log_timestamps: bool = False,
    retry_budget: float,
    limits: ReportLimits,
    log: Any,
    is_killed: Callable[[], bool],
    notifier: CallbackNotifier | None = None,
    is_shown: bool = True,
    earlier_attempts: int = 0,
) -> RemainingLog:
    """Relay the rest of a run's log and its outcome; return what it showed: the last lines, the outcome.

    Args:
        event: The trigger's event, with ``rest`` and ``tail``.
        outcome: How the run ended, without what it reported. None: it has not, and what there is of its log
            is relayed.
        reports: Receives what the run reports.
        run_name: The run's name.
        url: The address of the run's page; None if it is not known.
        hook: Makes the client.
        secrets: What is masked, beside the run's ``env`` and the token.
        collect: ``collect_secrets`` of ``dstack_core`` with the task's rule for the run's ``env``.
        log_budget_bytes: The most bytes of the whole log to relay. None: all.
        log_timestamps: Whether each line begins with its time.
        retry_budget: Seconds to keep retrying an unreachable server, but 60 at most.
        limits: The limits on what the run reports.
        log: The task's log.
        is_killed: Returns whether the task was ended meanwhile.
        notifier: Calls the callbacks; the end is left to the caller. Default: none are called.
        is_shown: Whether lines are logged. Default True.
        earlier_attempts: The number of attempts of the steps before (``fallbacks``). Default 0.

    Raises:
        DstackRunInterrupted: The task was ended before the log was relayed.
    """
    rest = RemainingLog(
        event,
        outcome,
        reports,
        run_name,
        url,
        hook,
        secrets,
        collect,
        log_budget_bytes,
        retry_budget,
        limits,
        log,
        notifier,
    )
    rest.log_timestamps, rest.is_shown = log_timestamps, is_shown
    rest.earlier_attempts = earlier_attempts
    start_thread(rest.work, "dstack-log")
    try:
        while not rest.is_done:
            if is_killed():
                ended = "" if outcome is None else f" {outcome.message}"
                raise DstackRunInterrupted(
                    f"The task was ended while the rest of its log was relayed. Run {run_name}{ended}. "
                    f"See {rest.url}"
                )
            time.sleep(_TICK_SECONDS)
    finally:
        rest.is_left = True
    return rest


# Without a repr: it would show the secrets.
@dataclass(repr=False)
class RemainingLog:
    """The rest of one run's log.

    ``is_done``, ``is_whole``, ``outcome``, ``reports``, ``tail`` and ``relayed`` (the state of the relay) are
    written by the worker thread, then read.
    """

    event: Mapping[str, Any]
    outcome: Outcome | None
    reports: RunReports
    run_name: str
    url: str | None
    hook: DstackHook
    secrets: Iterable[str]
    collect: Callable[..., list[str]]
    log_budget_bytes: int | None
    retry_budget: float
    limits: ReportLimits
    log: Any
    notifier: CallbackNotifier | None = None
    log_timestamps: bool = False
    is_shown: bool = True
    earlier_attempts: int = 0
    is_unreachable: bool = False
    is_done: bool = False
    is_whole: bool = False
    is_tail_shown: bool = False
    is_left: bool = False
    tail: list[str] = field(default_factory=list)
    relayed: dict[str, Any] | None = None
    groups: LogGroups = field(default_factory=LogGroups)

    def __post_init__(self) -> None:
        self.retry_budget = min(self.retry_budget, _RETRY_SECONDS)
        self._does_not_wait = self.outcome is None

    def work(self) -> None:
        """Relay everything; an error is logged, and leaves the rest of the log to the run's page."""
        # Known also if the log cannot be read.
        progress = LogPosition.from_dict(self.event["rest"]).progress
        self._note_reports(progress)
        with suppress(_Left):
            try:
                with self.hook.client(retry_budget=self.retry_budget) as client:
                    self._relay(client)
            except Exception as error:
                if not self.is_left:
                    self._give_up(error)
        self.is_done = True

    def _give_up(self, error: Exception) -> None:
        reason = str(error).rstrip(".")
        see = f" See {self.url}" if self.url else ""
        self.log.warning("Could not relay the rest of the log of run %s: %s.%s", self.run_name, reason, see)
        self._show_outcome(new_relay(url=self.url or ""))

    def _relay(self, client: Client) -> None:
        from dstack_core import LogLines, Reported, ReportsDropped, RunFinished
        from dstack_core.integration import counted_on

        position = LogPosition.from_dict(self.event["rest"])
        run = self._run(client, position.progress.run_id)
        if self.notifier is not None:
            self.notifier.follows(run, client.project)
        relay = self._new_relay(run)
        if self.notifier is not None:
            self.notifier.mask = relay.masker.mask
        events = run.follow(
            position.progress,
            retry_budget=self.retry_budget,
            sleep=self._sleep,
            report_limits=self.limits,
            timestamps=self.log_timestamps,
            waiting_interval=None,
            utilization=True,
        )
        for own in self._until_read(events):
            event = counted_on(own, self.earlier_attempts)
            if isinstance(event, LogLines):
                for part, _ in position.new_parts(event):
                    self._write(relay, part)
                    self._notify(part)
                    position.relayed(part, event)
            elif isinstance(event, RunFinished):
                self.outcome = event.outcome
            elif isinstance(event, Reported | ReportsDropped):
                self._write(relay, event)
                self._notify(event)
                # What is known so far counts if the rest cannot be read.
                self._note_reports(event.progress)
            else:
                self._report(event)
                self._notify(event)
            position.passed(event)
        self.tail, self.is_tail_shown = relay.tail, relay.shows_tail
        self.relayed = relay.state()
        self.is_whole = True
        self._show_outcome(relay)

    def _until_read(self, events: Iterator[Event]) -> Iterator[Event]:
        """Yield the events up to the run's end, or up to the first wait for news if it has none."""
        with suppress(_AllRead):
            yield from events

    def _note_reports(self, progress: Progress) -> None:
        if self.outcome is not None:
            self.outcome = self.outcome.with_reports(progress.reported)

    def _run(self, client: Client, run_id: str | None) -> Run:
        from dstack_core import RunNotFoundError

        run = client.runs.get(self.run_name, sleep=self._sleep, on_event=self._report)
        if run is None or run_id not in (None, run.id):
            # Another run of that name would have other secrets to hide.
            raise RunNotFoundError("it is no longer on the server, or another run has its name")
        self.url = run.url
        return run

    def _new_relay(self, run: Run) -> LogRelay:
        rest = self.event["rest"]
        secrets = [*self.collect(env=run.env, others=[self.hook.token]), *self.secrets]
        for secret in secrets:
            mask_secret(secret)
        return new_relay(
            tail=self.event["tail"],
            relayed_bytes=rest["relayed_bytes"],
            left_out_bytes=rest["left_out_bytes"],
            log_budget_bytes=self.log_budget_bytes,
            url=run.url,
            secrets=secrets,
        )

    def _write(self, relay: LogRelay, event: Event) -> None:
        for level, text in records(relay, event, self.reports, self.groups):
            self._check()
            if self.is_shown:
                self.log.log(level, text)

    def _notify(self, event: Event) -> None:
        if self.notifier is not None:
            self.notifier.handle(event)

    def _show_outcome(self, relay: LogRelay) -> None:
        from dstack_core import Progress, RunFinished

        if self.outcome is not None:
            self._write(relay, RunFinished(Progress(self.run_name), self.outcome))

    def _report(self, event: Event) -> None:
        from dstack_core import ContactLost, ContactRestored

        if isinstance(event, ContactLost):
            reason, seconds = event.error.rstrip("."), round(event.gives_up_in)
            self.is_unreachable = True
            self.log.warning("%s. Retrying for another %s s.", reason, seconds)
        elif isinstance(event, ContactRestored):
            self.is_unreachable = False
            self.log.info("The dstack server answers again after %.0f s.", event.silent_for)

    def _sleep(self, seconds: float) -> None:
        from dstack_core import clock

        if self._does_not_wait and not self.is_unreachable:
            raise _AllRead
        self._check()
        clock.sleep_in_slices(seconds, _TICK_SECONDS, self._check)

    def _check(self) -> None:
        if self.is_left:
            raise _Left


class _Left(Exception):
    """Leave the log: the task was ended."""


class _AllRead(Exception):
    """Leave the log: what there is of it was read."""
