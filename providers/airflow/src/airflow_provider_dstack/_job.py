"""Submit and follow one run in a helper thread, so that the main thread is always free to be killed.

Airflow calls ``on_kill`` in a signal handler of the main thread. Whatever the main thread was doing then
stands still: had it been logging or asking the supervisor, ``on_kill`` would wait for a lock for ever. So
the main thread only sleeps, and talks to the two threads here through plain attributes: a worker that
submits, follows and relays the log, and a stopper that waits to be told to stop the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._relay import Relay
from airflow_provider_dstack._stop import INSIST_SECONDS, OnKillAction, stop_patiently, stop_run
from airflow_provider_dstack._threads import answer_within, start_thread

if TYPE_CHECKING:
    from airflow_provider_dstack._durable import Ledger
    from airflow_provider_dstack._names import RunId
    from airflow_provider_dstack._submission import Submitter
    from dstack_core import Client, Outcome, Progress, Run

_TICK_SECONDS = 0.1
# Airflow's supervisor kills the process 5 seconds after its SIGTERM.
_KILL_SECONDS = 3.5
_SETTLE_SECONDS = 4.3
_PATIENT_SETTLE_SECONDS = 45.0
# Asking why the process is ended takes up to 3 s.
_ASK_SECONDS = 3.2
_INSIST_INTERVAL = 0.5


@dataclass(frozen=True)
class JobOptions:
    """Say what to follow and how; ``poll_interval``, ``retry_budget``, ``hand_over_after`` in seconds.

    ``run`` is the run of this try. ``hand_over_after`` None follows to the end. ``was_ended`` asks Airflow
    whether the task was ended meanwhile; it is asked once, before the run is handed over.
    ``next_try_follows`` returns whether the task's next try takes the run over after an error, ``why_kept``
    in words why a run is kept after a kill, or None. ``ledger`` forgets the run once it succeeded.
    ``on_submitted`` is told the run, in the worker's thread. ``is_ready`` is asked between two looks; the
    run is handed over once it says yes. ``secrets`` are shown as ``***`` wherever a log line goes.
    """

    run: RunId
    poll_interval: float
    retry_budget: float
    logs: bool
    on_kill_action: OnKillAction
    hand_over_after: float | None
    was_ended: Callable[[], bool]
    next_try_follows: Callable[[BaseException], bool]
    why_kept: Callable[[], str | None] = lambda: None
    ledger: Ledger | None = None
    on_submitted: Callable[[Run], None] = lambda run: None
    is_ready: Callable[[Run], bool] | None = None
    log_budget_bytes: int | None = None
    secrets: tuple[str, ...] = ()


class RunJob:
    """Hold one run of one try; all attributes are plain values, so that a signal handler may use them.

    ``outcome`` and ``error`` say how it ended; with neither, it was handed over, or ``killed``.
    ``target`` is the run, ``progress`` and ``relay`` are what the next follower needs. ``kept`` says in
    words why the run was left alone.
    """

    def __init__(
        self, obtain: Callable[[Submitter], Run], kill_client: Client, options: JobOptions, log: Any
    ) -> None:
        self.outcome: Outcome | None = None
        self.progress: Progress | None = None
        self.error: BaseException | None = None
        self.submitted = False
        self.killed = False
        self.stopped = False
        self.kept = ""
        self.relay = Relay(log_budget_bytes=options.log_budget_bytes, secrets=options.secrets)
        self.target = options.run
        self.project = kill_client.project
        self._obtain = obtain
        self._kill_client = kill_client
        self._options = options
        self._log = log
        self._started = False
        self._submitting = False
        self._must_stop = False
        self._worker_over = False
        self._stopper_over = False
        self._give_up_at = float("inf")

    def follow(self) -> None:
        """Submit and follow the run; sleep until it is over, handed over, or the task was killed.

        What interrupts the sleep (a timeout, Ctrl-C) has the run stopped and is raised again.
        """
        try:
            self._started = True
            start_thread(self._stop_when_killed, "dstack-stop")
            start_thread(self._work, "dstack-run")
            self._sleep_until_over()
        except BaseException:
            self._must_stop = True
            self.kill(settle=_PATIENT_SETTLE_SECONDS)
            self._sleep_until_over()
            if not self.killed and self.submitted and self.outcome is None:
                self.stop()
            raise

    def kill(self, *, settle: float = _SETTLE_SECONDS) -> None:
        """Have the run stopped; return when the server was asked, at the latest after 3.5 seconds.

        A run that the task's next try will follow is kept. Safe in a signal handler: sets attributes and
        sleeps, nothing else. ``settle`` (seconds) is how long ``follow`` then waits for a submission that is
        under way.
        """
        if self._worker_over or self.killed:
            return
        self._give_up_at = time.monotonic() + settle
        self.killed = True
        deadline = time.monotonic() + _KILL_SECONDS
        while self._started and not (self._stopper_over or self.stopped) and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)

    def stop(self) -> None:
        """Stop the run, or keep it where that is wanted; takes seconds, and is not for signal handlers."""
        options = self._options
        if options.on_kill_action == "keep":
            self._log.warning("Run %s is kept: on_kill_action is 'keep'", self.target.name)
            return
        abort = options.on_kill_action == "abort"
        self.stopped = stop_patiently(self._kill_client, *self.target, abort=abort, log=self._log)

    def stop_or_leave(self, error: BaseException | None = None) -> None:
        """Leave the run to the task's next try when there is one, after ``error`` or a kill; else stop it.

        Takes seconds, and is not for signal handlers.
        """
        if not self._left_to_next_try(error):
            self.stop()

    def interruption(self) -> str:
        """Say in words what became of the run when the task was killed."""
        name = self.target.name
        if self.kept:
            return f"The task's process was ended. Run {name} keeps running. {self.kept}"
        if self._options.on_kill_action == "keep":
            told = "it is kept, because on_kill_action is 'keep'"
        elif not self._started:
            told = "it was not submitted"
        elif self.stopped:
            told = "it was asked to stop"
        else:
            told = f"it could not be stopped and may still be going; stop it with: dstack stop {name}"
        return f"The task was ended while run {name} was going; {told}"

    def aim(self, run: RunId) -> None:
        """Have a kill stop this run from now on."""
        # In this order: either this thread sees the kill, or the stopper sees the new target.
        self.target = run
        if self.killed:
            raise _Killed

    def pause(self, seconds: float) -> None:
        """Sleep; end early when the task is killed."""
        self._sleep(seconds)

    def _sleep_until_over(self) -> None:
        while not (self._worker_over and (self._stopper_over or not self.killed)):
            if time.monotonic() >= self._give_up_at:
                return
            time.sleep(2 * _TICK_SECONDS)

    def _work(self) -> None:
        try:
            self._submit_and_follow()
        except (_HandOver, _Killed):
            pass
        except BaseException as error:
            self.error = error
            if not self.killed and self._may_leave_a_run(error):
                self.stop_or_leave(error)
        finally:
            self._submitting = False
            if self.outcome is None and self.error is None and not self.killed and self._options.was_ended():
                self._give_up_at = time.monotonic() + _PATIENT_SETTLE_SECONDS
                self.killed = True
            self._worker_over = True

    def _submit_and_follow(self) -> None:
        from dstack_core import Progress, RunFinished

        options = self._options
        # In this order: either this thread sees the kill, or the stopper sees the submission.
        self._submitting = True
        if self.killed:
            return
        run = self._obtain(self)
        self.submitted = True
        self._submitting = False
        self.progress = Progress(run.name, run.id)
        self.relay.url = run.url
        self._log.info("Run %s in project %s: %s", run.name, self.project, run.url)
        options.on_submitted(run)
        events = run.follow(
            poll_interval=options.poll_interval,
            logs=options.logs,
            retry_budget=options.retry_budget,
            sleep=self._sleeper(run),
        )
        for event in events:
            for level, text in self.relay.records(event):
                self._log.log(level, text)
            self.progress = event.progress
            if isinstance(event, RunFinished):
                self.outcome = event.outcome
                if options.ledger is not None and event.outcome.succeeded:
                    options.ledger.forget()
            elif self.killed:
                raise _Killed

    def _sleeper(self, run: Run) -> Callable[[float], None]:
        """Return a sleep that ends early: when killed, and when it is time to hand over."""
        hand_over_after, is_ready = self._options.hand_over_after, self._options.is_ready
        hand_over_at = float("inf") if hand_over_after is None else time.monotonic() + hand_over_after

        def sleep(seconds: float) -> None:
            if is_ready is not None and not self.killed and is_ready(run):
                raise _HandOver
            self._sleep(seconds, hand_over_at)

        return sleep

    def _sleep(self, seconds: float, hand_over_at: float = float("inf")) -> None:
        end = time.monotonic() + seconds
        while not self.killed:
            now = time.monotonic()
            if now >= hand_over_at:
                raise _HandOver
            if now >= end:
                return
            time.sleep(min(_TICK_SECONDS, end - now))
        raise _Killed

    def _may_leave_a_run(self, error: BaseException) -> bool:
        """Tell whether there may be a run: a refused submission leaves none, a lost reply may."""
        from dstack_core import DstackError, ServerUnreachableError

        return (
            self.submitted or isinstance(error, ServerUnreachableError) or not isinstance(error, DstackError)
        )

    def _left_to_next_try(self, error: BaseException | None) -> bool:
        if self._must_stop:
            return False
        # Airflow may be as silent as the rest of a machine that goes down.
        self.kept = answer_within(_ASK_SECONDS, lambda: self._why_kept(error) or "") or ""
        if self.kept:
            page = self.relay.url or "unknown, since its submission was not answered yet"
            self._log.warning("Run %s: %s. Its page: %s", self.target.name, self.kept, page)
        return bool(self.kept)

    def _why_kept(self, error: BaseException | None) -> str | None:
        if error is None:
            return self._options.why_kept()
        follows = self._options.next_try_follows(error)
        return "The run is kept for the task's next try" if follows else None

    def _stop_when_killed(self) -> None:
        while not self.killed:
            if self._worker_over:
                return
            time.sleep(_TICK_SECONDS)
        if self._options.on_kill_action != "keep" and not self._left_to_next_try(None):
            self._ask_to_stop()
        self._stopper_over = True

    def _ask_to_stop(self) -> None:
        abort = self._options.on_kill_action == "abort"
        while time.monotonic() < self._give_up_at:
            # Looked at before asking: a run that appears meanwhile needs another round.
            submitting = self._submitting
            try:
                found = stop_run(self._kill_client, *self.target, abort=abort)
            except Exception as error:
                self._log.warning("Stopping run %s failed: %s", self.target.name, error)
            else:
                self.stopped = found is not None or not submitting
                if self.stopped:
                    self._insist(found)
                    return
            time.sleep(_TICK_SECONDS)

    def _insist(self, run: Run | None) -> None:
        """Wait for the end of the stopped run while there is time: waiting repeats a forgotten stop."""
        left = min(INSIST_SECONDS, self._give_up_at - time.monotonic() - _TICK_SECONDS)
        if run is None or left <= 0:
            return
        try:
            run.wait(left, poll_interval=_INSIST_INTERVAL)
        except Exception as error:
            self._log.debug("Run %s was asked to stop; its end was not seen: %s", run.name, error)


class _Killed(Exception):
    """Leave the run because the task was killed."""


class _HandOver(Exception):
    """Leave the run to the trigger."""
