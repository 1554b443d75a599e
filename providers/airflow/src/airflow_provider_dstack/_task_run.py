"""One run of one try, as a state machine that three threads share.

The problem: Airflow calls ``on_kill`` in a signal handler of the main thread, five seconds before it kills
the process. The work of the main thread is suspended meanwhile: if it was logging or calling the supervisor,
``on_kill`` would wait for a lock that is never released. A timeout, an error, a worker that shuts down and a
user who ends the task can come in any order, also while the run is being submitted or handed to the
triggerer.

The idea: the state has one writer. All other threads post events into a deque, which needs no lock, and read
plain attributes::

    main thread                      worker thread                   control thread
    -----------                      -------------                   --------------
    follow(): starts both ---------> obtains and follows the run,    takes one event after the other,
      sleeps until the state           relays its log                moves the state by TRANSITIONS,
      is final                         |                             and does what the new state asks
    kill(), in the handler:            +-- OBTAINED, FINISHED, ----> for: decides (keep or stop),
      posts KILLED, sleeps ------------+   HANDED_OVER, FAILED       or stops the run
    interrupt(): posts INTERRUPTED, ------------------------------>
      sleeps
                  <------------------- state, stopped, kept ---------

Invariants: the main thread only sleeps while another thread works, so a handler never interrupts it inside a
lock. The worker leaves its run at the next sleep or event after a kill. The stop is sent by the control
thread, whatever the worker is waiting for. A state is final once nothing is left to do for the run.

A task with fallbacks follows one run after the other. In the state FOLLOWING, ``run`` is None from the end
of one until the next is submitted. ``ref`` is the run that a stop is about: the one that has ended, which
takes no time, or from ``aim`` on the next, whose submission may be under way.

Measured: from SIGTERM to SIGKILL 5.0 s, not configurable (Airflow 3.2, 3.3). With all work in the main thread
7 of 7 kills during logging or supervisor calls hung until SIGKILL; with helper threads 0 of 4.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from airflow_provider_dstack._compat import AirflowTaskTimeout
from airflow_provider_dstack._log_groups import LogGroups
from airflow_provider_dstack._log_relay import new_relay, records
from airflow_provider_dstack._run_reports import ReportPusher, RunReports
from airflow_provider_dstack._stop import (
    KEEP_ASKED_FOR,
    KILL_SECONDS,
    OnKillAction,
    log_kept,
    stop_seconds,
    stop_task_run,
)
from airflow_provider_dstack._threads import start_thread

if TYPE_CHECKING:
    from airflow_provider_dstack._previous_try import Ledger
    from airflow_provider_dstack._submission import Submitter
    from dstack_core import Client, Outcome, Progress, ReportLimits, Run, RunFinished
    from dstack_core import Event as RunEvent
    from dstack_core.integration import CallbackNotifier, RunRef, Steps, StopResult

# How late the threads see each other's news. A thread may not wait for a lock here: the handler interrupts
# the main thread anywhere.
_TICK_SECONDS = 0.05
# The handler returns, and the task fails, before Airflow's SIGKILL at 5.0 s: the last line of the stop is
# logged at 4.0 s at the latest, and the failure has to reach the supervisor after that.
_SETTLE_SECONDS = KILL_SECONDS + 0.3
# How long a kill may still come after the run was handed over. A worker may report a deferral 5 s late; with
# less, a kill in that time stops no run.
_LINGER_SECONDS = 8.0


class State(Enum):
    """The state of a try's run; the last five are final."""

    NEW = auto()
    SUBMITTING = auto()
    FOLLOWING = auto()
    KILLED = auto()
    INTERRUPTED = auto()
    FAILED = auto()
    STOPPING = auto()
    ENDED = auto()
    HANDED_OVER = auto()
    NOTHING_LEFT = auto()
    KEPT = auto()
    STOPPED = auto()


class Event(Enum):
    """An event of a try's run: something that happened to it, or that was decided about it."""

    STARTED = auto()
    OBTAINED = auto()
    FINISHED = auto()
    HANDED_OVER = auto()
    FAILED = auto()
    KILLED = auto()
    INTERRUPTED = auto()
    LEAVE = auto()
    KEEP = auto()
    STOP = auto()
    STOPPED = auto()


FINAL = frozenset({State.ENDED, State.HANDED_OVER, State.NOTHING_LEFT, State.KEPT, State.STOPPED})

# Events that are missing here change nothing: a second kill, or news of a run that is being stopped.
TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.NEW, Event.STARTED): State.SUBMITTING,
    (State.NEW, Event.KILLED): State.NOTHING_LEFT,
    (State.NEW, Event.INTERRUPTED): State.NOTHING_LEFT,
    (State.SUBMITTING, Event.OBTAINED): State.FOLLOWING,
    (State.SUBMITTING, Event.FAILED): State.FAILED,
    (State.SUBMITTING, Event.KILLED): State.KILLED,
    (State.SUBMITTING, Event.INTERRUPTED): State.INTERRUPTED,
    (State.FOLLOWING, Event.FINISHED): State.ENDED,
    (State.FOLLOWING, Event.HANDED_OVER): State.HANDED_OVER,
    (State.FOLLOWING, Event.FAILED): State.FAILED,
    (State.FOLLOWING, Event.KILLED): State.KILLED,
    (State.FOLLOWING, Event.INTERRUPTED): State.INTERRUPTED,
    (State.HANDED_OVER, Event.KILLED): State.KILLED,
    (State.HANDED_OVER, Event.INTERRUPTED): State.INTERRUPTED,
    (State.KILLED, Event.KEEP): State.KEPT,
    (State.KILLED, Event.STOP): State.STOPPING,
    (State.INTERRUPTED, Event.KEEP): State.KEPT,
    (State.INTERRUPTED, Event.STOP): State.STOPPING,
    (State.FAILED, Event.LEAVE): State.NOTHING_LEFT,
    (State.FAILED, Event.KEEP): State.KEPT,
    (State.FAILED, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.STOPPED): State.STOPPED,
}


class Ladder(Protocol):
    """The steps of a task with fallbacks, called in the worker thread."""

    @property
    def steps(self) -> Steps | None:
        """What is known of them; None for a task without fallbacks."""

    def counted(self, event: RunEvent) -> RunEvent:
        """Return an event with the number of its attempt in all steps."""

    def end(self, event: RunFinished) -> RunFinished | None:
        """Return the end of the task's job after the end of a run, None if another step follows."""

    def obtain_next(self, submitter: Submitter) -> Run | RunFinished:
        """Submit the step that follows, or return the end of the job."""


@dataclass(frozen=True)
class TaskRunOptions:
    """What to follow, and how.

    Args:
        ref: The run of this try.
        poll_interval: Seconds between two status requests.
        retry_budget: Seconds for which an unreachable dstack server is retried.
        logs: Whether the run's log is relayed.
        on_kill_action: What happens to the run if the task ends before it.
        hand_over_after: Seconds until the run is handed to the triggerer; None follows it to its end.
        was_ended: Asks Airflow whether a user ended the task; asked once before the run is handed over.
        next_try_follows: Whether the task's next try takes the run over after an error.
        why_kept: Asks why the process is being killed; returns in words why the run is kept, None to stop it.
        ledger: Forgets the run once it succeeded.
        on_submitted: Gets the run, in the worker thread.
        is_ready: Asked between two polls; the run is handed over once it returns true.
        log_budget_bytes: Bytes of log that are relayed; None relays all.
        log_timestamps: Whether each line begins with its time.
        log_groups: Whether what is logged before the run has started is folded.
        secrets: Texts that are shown as ``***`` wherever a log line goes.
        report_limits: The limits on what the run reports; None: the defaults of ``dstack_core``.
        new_notifier: Returns what calls the callbacks, with what masks secrets.
        push_reports: Gets the XComs of what the run reported since, and the reports, in the worker thread.
        ladder: The steps of a task with fallbacks; None: its job ends with its first run.
        resumed: What the task has shown of earlier steps: the state of its ``LogRelay`` and, as ``reported``,
            that of ``RunReports``. ``ref`` is then the step that has ended. None: nothing.
        deadline: When the task times out, in seconds since the epoch, where Airflow does not see to it.
    """

    ref: RunRef
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
    log_timestamps: bool = False
    log_groups: bool = False
    secrets: tuple[str, ...] = ()
    report_limits: ReportLimits | None = None
    push_reports: Callable[[Mapping[str, Any], RunReports], None] = lambda xcoms, reports: None
    new_notifier: Callable[[Callable[[str], str]], CallbackNotifier] | None = None
    ladder: Ladder | None = None
    resumed: Mapping[str, Any] | None = None
    deadline: float | None = None


class TaskRun:
    """One run of one try; see the module's docstring for who writes what.

    ``state`` is written by the control thread alone. ``ref`` (the target run), ``run``, ``progress``,
    ``outcome``, ``reports`` and ``error`` are the worker's. ``kept`` is the reason why the run was left
    running, in words, ``stopped`` what is known after a stop.
    """

    def __init__(
        self,
        obtain: Callable[[Submitter], Run | RunFinished],
        client: Client,
        options: TaskRunOptions,
        log: Any,
    ) -> None:
        self.state = State.NEW
        self.ref = options.ref
        self.run: Run | None = None
        self.progress: Progress | None = None
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.kept: str | None = None
        self.stopped: StopResult | None = None
        shown = dict(options.resumed or {})
        reported = shown.pop("reported", None)
        self.relay = new_relay(log_budget_bytes=options.log_budget_bytes, secrets=options.secrets, **shown)
        self.reports = RunReports(reported, self.relay.masker.mask)
        new = options.new_notifier
        self.notifier = None if new is None else new(self.relay.masker.mask)
        self._groups = LogGroups(options.log_groups)
        self.project = client.project
        self._obtain = obtain
        self._client = client
        self._options = options
        self._log = log
        self._pusher = ReportPusher(options.push_reports)
        self._events: deque[Event] = deque()
        self._why_left: str | None = None
        self._is_started = False
        # While the callbacks of a task that failed are waited for: its run is stopped meanwhile.
        self._is_draining = False
        self._drains_since: float | None = None
        self._is_over = False
        # From the end of a step on, until the next is aimed at: nothing is left to stop or to keep.
        self._is_between_steps = options.resumed is not None
        self._is_closed = False
        self._stop_by = float("inf")

    # The main thread.

    def follow(self) -> None:
        """Submit and follow the run; return once the state is final, or no time is left for it.

        An exception that interrupts the sleep (a timeout, Ctrl-C) has the run stopped, and is raised again.
        """
        try:
            deadline = self._seconds_left()
            if deadline <= 0:
                raise AirflowTaskTimeout("execution_timeout passed before the next step was submitted.")
            deadline += time.monotonic()
            self._is_started = True
            start_thread(self._control, "dstack-control")
            if not self._is_over:
                start_thread(self._work, "dstack-run")
            self._sleep_until_final(deadline)
            if time.monotonic() >= deadline and not self._is_over and self.state not in FINAL:
                raise AirflowTaskTimeout(f"execution_timeout passed before run {self.ref.name} ended.")
        except BaseException:
            self.interrupt()
            raise

    def kill(self) -> None:
        """Have the run stopped, or kept, because the process is being killed; takes at most 4.3 seconds.

        For signal handlers: it sets attributes and sleeps, nothing else.
        """
        if self._is_closed or (self.state in FINAL and self.state is not State.HANDED_OVER):
            # Nothing is left to do for the run; a wait for callbacks ends.
            self._is_over = self._is_over or self._is_draining
            return
        self._stop_within(KILL_SECONDS)
        self._leave(Event.KILLED)
        self._sleep_until_final(time.monotonic() + _SETTLE_SECONDS)

    def interrupt(self) -> None:
        """Have the run stopped because the task fails; returns once that is done. Takes seconds."""
        self._leave_unhurried(Event.INTERRUPTED)

    def end(self) -> None:
        """Have the run stopped or kept because the task was ended; returns once that is done."""
        self._leave_unhurried(Event.KILLED)

    def close(self) -> None:
        """End the control thread and close the connections."""
        self._is_closed = True
        self._client.close()

    @property
    def options(self) -> TaskRunOptions:
        """What is followed, and how."""
        return self._options

    @property
    def is_killed(self) -> bool:
        """Whether the task ends before its run, for whatever reason."""
        return self._is_over

    @property
    def submitted(self) -> bool:
        """Whether the server has taken the run."""
        return self.run is not None

    def interruption(self) -> str:
        """Return in words what became of the run when the task ended before it."""
        from dstack_core.integration import describe_stop

        match self.state:
            case State.NOTHING_LEFT | State.STOPPED if self._is_between_steps:
                found = f"Run {self.ref.name} has ended, and no further step was submitted."
            case State.NOTHING_LEFT if self.run is None:
                found = f"Run {self.ref.name} was not submitted."
            case State.KEPT:
                found = f"Run {self.ref.name} keeps running: {self.kept}."
            case State.STOPPED if self.stopped is not None:
                found = describe_stop(self.stopped)
            case _:
                found = f"The stop of run {self.ref.name} is not confirmed. Check its page: {self._page()}"
        return f"The task was ended before its run. {found}"

    def _seconds_left(self) -> float:
        from dstack_core import clock

        deadline = self._options.deadline
        return float("inf") if deadline is None else deadline - clock.epoch()

    def _leave_unhurried(self, event: Event) -> None:
        """Leave the run; for ways out where Airflow sets no limit to the stop."""
        seconds = stop_seconds(self._client)
        self._stop_within(seconds)
        self._leave(event)
        self._sleep_until_final(time.monotonic() + seconds + 1.0)

    def _stop_within(self, seconds: float) -> None:
        # The tightest limit counts: a kill may follow an interruption.
        self._stop_by = min(self._stop_by, time.monotonic() + seconds)

    def _leave(self, event: Event) -> None:
        # In this order: the worker must not begin a request whose run would not be stopped.
        self._is_over = True
        self._events.append(event)

    def _sleep_until_final(self, until: float = float("inf")) -> None:
        while self._is_started and (self._is_draining or not (self.state in FINAL and not self._events)):
            # A kill in the handler sets the limit for the sleep that it interrupted, too.
            limit = min(until, self._stop_by + _SETTLE_SECONDS - KILL_SECONDS)
            if time.monotonic() >= limit:
                return
            time.sleep(_TICK_SECONDS)

    # The control thread.

    def _control(self) -> None:
        lingers_until = float("inf")
        while not self._is_closed and time.monotonic() < lingers_until:
            if not self._events:
                time.sleep(_TICK_SECONDS)
                continue
            event: Event | None = self._events[0]
            while event is not None:
                state = TRANSITIONS.get((self.state, event))
                event = None
                if state is not None:
                    came_from, self.state = self.state, state
                    event = self._enter(state, came_from)
            # Only now: an event in the queue means that the state is not settled.
            self._events.popleft()
            if self.state is State.HANDED_OVER:
                lingers_until = time.monotonic() + _LINGER_SECONDS
        self.close()

    def _enter(self, state: State, came_from: State) -> Event | None:
        """Do what a state asks for; return the event that follows from it."""
        match state:
            case State.KILLED | State.INTERRUPTED | State.FAILED:
                return self._decide(state)
            case State.STOPPING:
                # In this order: the worker forgets the run of one step before it aims at the next. Read once:
                # it may do that meanwhile.
                ref, run = self.ref, self.run
                self.stopped = stop_task_run(
                    self._client,
                    ref,
                    action=self._options.on_kill_action,
                    timeout=max(0.1, self._stop_by - time.monotonic()),
                    run_id=None if run is None else run.id,
                    submitted=run is not None or self._is_between_steps,
                    log=self._log,
                )
                return Event.STOPPED
            case _:
                return None

    def _decide(self, state: State) -> Event:
        """Return whether the run is kept or stopped; it is stopped if that cannot be found out."""
        error = self.error
        if state is State.FAILED:
            self._stop_within(stop_seconds(self._client))
            if error is not None and not _may_leave_a_run(error, submitted=self.submitted):
                return Event.LEAVE
        if self._is_between_steps:
            # Its stop finds a run that has ended, and reports that; a next try finds the step that follows.
            return Event.STOP
        if self._why_left is not None:
            return self._keep(self._why_left)
        if self._options.on_kill_action == "keep":
            return self._keep(KEEP_ASKED_FOR)
        try:
            why = self._why_kept(state, error)
        except Exception as failure:
            self._log.warning("Could not find out whether run %s is kept: %r.", self.ref.name, failure)
            return Event.STOP
        return Event.STOP if why is None else self._keep(why)

    def _why_kept(self, state: State, error: BaseException | None) -> str | None:
        if state is State.INTERRUPTED:
            return None
        if state is State.KILLED:
            return self._options.why_kept()
        if error is not None and self._options.next_try_follows(error):
            return "it is kept for the task's next try"
        return None

    def _keep(self, why: str) -> Event:
        self.kept = why
        log_kept(self.ref.name, why, self._page(), self._log)
        return Event.KEEP

    def _page(self) -> str:
        run = self.run
        return self._client.run_url() if run is None else run.url

    # The worker thread.

    def aim(self, ref: RunRef) -> None:
        """Make this the target run; raises when the task was ended meanwhile."""
        # In this order: either this thread sees the end, or the control thread stops the new run.
        self.ref = ref
        if self._is_over:
            raise _Over
        self._is_between_steps = False

    def keep(self, why: str) -> None:
        """Leave the run running however the task ends; ``why`` is for the log."""
        self._why_left = why

    def pause(self, seconds: float) -> None:
        """Sleep; raises as soon as the task is ended."""
        self._sleep(seconds)

    def _work(self) -> None:
        self._events.append(Event.STARTED)
        try:
            self._submit_and_follow()
            event = Event.FINISHED
        except _Over:
            return
        except _HandOver:
            event = Event.HANDED_OVER
            if self._options.was_ended():
                self._stop_within(stop_seconds(self._client))
                self._is_over = True
                event = Event.KILLED
        except BaseException as error:
            self.error = error
            # The run is stopped before user code is waited for.
            self._is_draining = True
            self._events.append(Event.FAILED)
            self._finish_calls()
            self._is_draining = False
            return
        self._finish_calls()
        self._events.append(event)

    def _finish_calls(self) -> None:
        """Wait until the callbacks have returned: the process may end after this. A kill ends the wait."""
        for pause in () if self.notifier is None else self.notifier.pauses(since=self._drains_since):
            if self._is_over:
                return
            time.sleep(pause)

    def _submit_and_follow(self) -> None:
        """Follow one run after the other up to the end of the job; without fallbacks it has one."""
        from dstack_core import RunFinished

        ladder = self._options.ladder
        found = self._obtain(self)
        # A run of another name or marker is that of an earlier try.
        is_taken_over = not isinstance(found, RunFinished) and self._is_of_earlier_try()
        while not isinstance(found, RunFinished):
            event = self._follow_run(found, is_taken_over)
            ended = event if ladder is None else ladder.end(event)
            self._show(ended or event)
            self.progress = event.progress
            if ended is not None or ladder is None:
                self._end(ended or event)
                return
            self._is_between_steps, self.run = True, None
            found, is_taken_over = ladder.obtain_next(self), False
        self._log.info("Run %s %s.", found.outcome.run_name, found.outcome.message)
        self._end(found)

    def _end(self, event: RunFinished) -> None:
        if self.notifier is not None:
            self.notifier.handle(event)
        self._pusher.offer(self.reports, last=True)
        self.outcome = event.outcome
        ledger = self._options.ledger
        if ledger is not None and event.outcome.succeeded:
            ledger.forget()

    def _show(self, event: RunEvent) -> None:
        for level, text in records(self.relay, event, self.reports, self._groups):
            self._log.log(level, text)

    def _follow_run(self, run: Run, is_taken_over: bool) -> RunFinished:
        """Follow a run, and relay its log; return its end, which the log does not show yet."""
        from dstack_core import RunFinished

        options = self._options
        self.run = run
        self.progress = _progress_of(run)
        self.relay.url = run.url
        self._events.append(Event.OBTAINED)
        self._log.info("Run %s in project %s: %s", run.name, self.project, run.url)
        if self.progress.status is not None:
            # The reply to the submission has it, so the log shows before the first poll that the run exists.
            self._log.info("Run %s is %s", run.name, self.progress.status)
        options.on_submitted(run)
        if self.notifier is not None:
            self.notifier.submitted(run, self.project, progress=self.progress, is_taken_over=is_taken_over)
        events = run.follow(
            self.progress,
            poll_interval=options.poll_interval,
            logs=options.logs,
            retry_budget=options.retry_budget,
            sleep=self._sleeper(run),
            report_limits=options.report_limits,
            timestamps=options.log_timestamps,
            utilization=True,
        )
        try:
            for event in events:
                if isinstance(event, RunFinished):
                    return event
                shown = event if options.ladder is None else options.ladder.counted(event)
                self._show(shown)
                if self.notifier is not None:
                    self.notifier.handle(shown)
                self.progress = event.progress
                self._pusher.offer(self.reports)
                if self._is_over:
                    raise _Over
        finally:
            for level, text in self._groups.close():
                self._log.log(level, text)
        raise RuntimeError(f"following run {run.name} ended without an outcome")

    def _is_of_earlier_try(self) -> bool:
        from dstack_core.integration import split_step, step_ref

        own = self._options.ref
        return self._options.resumed is None and self.ref != step_ref(own, split_step(self.ref.marker)[1])

    def _sleeper(self, run: Run) -> Callable[[float], None]:
        """Return a sleep that ends early: when the task is ended, and when it is time to hand over."""
        from dstack_core import clock

        hand_over_after, is_ready = self._options.hand_over_after, self._options.is_ready
        hand_over_at = float("inf") if hand_over_after is None else clock.monotonic() + hand_over_after

        def sleep(seconds: float) -> None:
            if is_ready is not None and not self._is_over and is_ready(run):
                raise _HandOver
            # The run may report nothing further that would start the push.
            self._pusher.offer(self.reports)
            self._sleep(seconds, hand_over_at)

        return sleep

    def _sleep(self, seconds: float, hand_over_at: float = float("inf")) -> None:
        from dstack_core import clock

        def check() -> None:
            if self._is_over:
                raise _Over
            if clock.monotonic() >= hand_over_at and not self._drains(hand_over_at):
                raise _HandOver

        check()
        clock.sleep_in_slices(seconds, _TICK_SECONDS, check)

    def _drains(self, hand_over_at: float) -> bool:
        """Whether callbacks are still busy, so that this process follows the run for a little longer.

        It ends after the hand-over, and a slow callback must not delay the log.
        """
        self._drains_since = hand_over_at
        return self.notifier is not None and self.notifier.is_waited_for(hand_over_at)


class _Over(Exception):
    """A signal that the worker thread leaves the run, because the task was ended."""


class _HandOver(Exception):
    """A signal that the worker thread leaves the run to the trigger."""


def _progress_of(run: Run) -> Progress:
    """Return where to follow a run from: its end, and a stop under way, are for the follower to report."""
    from dstack_core import Progress, clock

    status = run.last_status
    if status.is_ending:
        return Progress(run.name, run.id)
    return Progress(run.name, run.id, status=str(status), since={str(status): clock.epoch()})


def _may_leave_a_run(error: BaseException, *, submitted: bool) -> bool:
    """Whether there may be a run: a refused submission leaves none, a lost reply may."""
    from dstack_core import DstackError, ServerUnreachableError

    return submitted or isinstance(error, ServerUnreachableError) or not isinstance(error, DstackError)
