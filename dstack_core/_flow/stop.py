"""Stop a run, and make sure that the stop holds (PROTOCOL 1.7).

The problem: the server stops by name, replies late when it is busy, and a server from 0.20 on that is short
of CPU can accept a stop and then overwrite it, so that the run is running again. Callers have between four
seconds (a signal handler) and a minute.

The idea: one loop for all callers. It sends the stop, polls the run, and sends the stop again only when a
poll shows that it did not hold. What precedes the stop depends on what the caller knows (``Check``).

Invariants: no request takes longer than the caller has left. An accepted stop is repeated at most every
``REPEAT_SECONDS``, or once sooner if the caller has no more time than that. A stop that failed, or that was
sent before the run existed, is sent again as soon as a poll shows the run active. A refused stop ends the
loop.

Measured: a dropped stop shows within about a second on dstack 0.22.5 (events: TERMINATING, RUNNING); with 12
stops at once on two busy cores 3 of 24 were dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from dstack_core._flow.accepted_stops import REPEAT_SECONDS, Stops
from dstack_core._flow.hold import with_hold
from dstack_core._flow.steps import Op, Sleep, call
from dstack_core._flow.stop_options import Check, StopOptions, Stopped, StopTarget, Until
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Call
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core.errors import (
    AccessDeniedError,
    ProtocolError,
    RequestRejectedError,
    ServerError,
    ServerUnreachableError,
    TransientServerError,
    WaitTimeoutError,
)
from dstack_core.models.stops import StopResult, StopState

# If the whole time is shorter than ``REPEAT_SECONDS``, one repeat comes early: a dropped stop shows within
# about a second. An earlier one would also repeat stops that the server is only slow to show.
_EARLY_REPEAT_SECONDS = 1.0
# The share of the time that an unanswered check may take before the stop is sent anyway: 1.6 s of the 4 s of
# a signal handler, so that a server that needs 2 s for the stop still gets it in time.
_CHECK_SHARE = 0.4
# Between two polls, in seconds. The first comes at once: a server that keeps a stop shows it in its next
# reply. After that a signal handler has no more than seconds, so longer pauses would cost it the answer.
_PAUSES = (0.0, 0.5, 1.0)
# A graceful stop takes 3 to 12 s (PROTOCOL 1.7), so a run that needs longer is polled less often. A smaller
# number makes an ordinary stop look slower than it is; a larger one only costs requests.
_SLOW_POLLS_AFTER = 15.0
_SLOW_PAUSE = 2.0

T = TypeVar("T")

# Faults that another request may not meet. A refusal is final: repeating the request would waste the time.
_MAY_PASS = (TransientServerError, ProtocolError, ServerUnreachableError)


def stop(api: Api, target: StopTarget, options: StopOptions, stops: Stops) -> Op[Stopped]:
    """Stop a run and return what is known of it.

    Raises the server errors only where ``options.timeout`` is None.
    """
    steps = _Stop(api, target, options, stops)
    stopped = yield from steps.steps()
    outcome = stopped.result.outcome
    if outcome is None or steps.run is None:
        return stopped
    outcome = yield from with_hold(api, steps.run, outcome, steps.seconds_left)
    return replace(stopped, result=replace(stopped.result, outcome=outcome))


def checked_stop(api: Api, target: StopTarget, options: StopOptions, stops: Stops) -> Op[StopResult]:
    """Do what ``stop`` does, and raise an error unless the result is what the caller asked for.

    Raises the server error behind a stop that was refused or never accepted, and ``WaitTimeoutError`` for one
    whose effect did not show in time.
    """
    stopped = yield from stop(api, target, options, stops)
    result, failure = stopped.result, stopped.failure
    within = f"within {round(options.timeout or 0.0, 1):g} s"
    if failure is not None:
        text = f"Could not stop run {result.run_name}: {failure.message.rstrip('.')}. It may still be running"
        raise _like(failure, f"{text}: {result.url}")
    if not result.is_safe:
        error = f"Run {result.run_name} is not stopping {within}: {result.error}. It may still be running"
        raise WaitTimeoutError(f"{error}: {result.url}")
    if options.until is Until.ENDED and result.state is StopState.STOPPING:
        raise WaitTimeoutError(f"Run {result.run_name} is stopping, but has not ended {within}: {result.url}")
    return result


def _like(failure: ServerError, message: str) -> ServerError:
    """Return an error of the same class with another message."""
    if isinstance(failure, RequestRejectedError):
        return RequestRejectedError(message, code=failure.code, status=failure.status)
    return type(failure)(message)


@dataclass(slots=True)
class _Stop:
    """One stop under way, and what is known of the run so far."""

    api: Api
    target: StopTarget
    options: StopOptions
    stops: Stops
    run: RunSnapshot | None = None
    requests: int = 0
    # When the last stop was accepted; None while it has to be sent (again).
    accepted_at: float | None = None
    early_repeats: int = 0
    failure: ServerError | None = None
    is_refused: bool = False
    was_seen_running: bool = False
    is_missing: bool = False
    is_reported: bool = False
    started: float = field(init=False)
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        timeout = self.options.timeout
        self.started = self.options.clock()
        self.deadline = float("inf") if timeout is None else self.started + timeout
        # A caller that has longer gets the ordinary repeat; more than one early repeat would be a burst.
        self.early_repeats = 1 if timeout is not None and timeout <= REPEAT_SECONDS else 0

    def steps(self) -> Op[Stopped]:
        if self.options.check is not Check.NEVER and (known := (yield from self._check())) is not None:
            return known
        is_enough = self.options.until is Until.ACCEPTED
        polls = 0
        while True:
            if self._is_due() and (refused := (yield from self._send())) is not None:
                return refused
            # A caller that only wants the stop accepted needs no poll after it, if one came before it.
            if is_enough and self.accepted_at is not None and self.run is not None:
                return self._known(StopState.ACCEPTED)
            pause = self._pause(polls)
            polls += 1
            if self._left() <= pause:
                return self._unconfirmed()
            if pause:
                yield Sleep(pause)
            if (yield from self._poll()):
                if (known := self._seen()) is not None:
                    return known
            elif is_enough and self.accepted_at is not None:
                return self._known(StopState.ACCEPTED)

    def _check(self) -> Op[Stopped | None]:
        """Return the result if a stop is needless or wrong, None if it must be sent."""
        polls = 0
        while True:
            is_required = self.options.check is Check.ALWAYS
            if (yield from self._poll(self._left() * (1.0 if is_required else _CHECK_SHARE))):
                known = self._seen()
                if self.options.abort and self.run is not None and self.run.status.is_stopping:
                    # An abort goes further than the stop that is under way.
                    self.accepted_at = known = None
                return known
            if not is_required:
                return None
            if self.is_refused:
                return self._known(StopState.REFUSED)
            polls += 1
            pause = self._pause(polls)
            if self._left() <= pause:
                return self._unconfirmed()
            yield Sleep(pause)

    def _send(self) -> Op[Stopped | None]:
        """Send the stop; return what ends the flow, None when it continues."""
        self.requests += 1
        # Counted from the request, not from its reply, which a busy server may send seconds later.
        sent_at = self.options.clock()
        try:
            yield from call(self._in_time(self.api.stop(self.target.name, abort=self.options.abort)))
        except ServerError as error:
            if isinstance(error, AccessDeniedError):
                error = AccessDeniedError(
                    f"{self.api.server_url} does not let this token's user stop runs of project "
                    f"{self.api.project!r}. Ask an admin of the project to add the user"
                )
            self._fail(error)
            return self._known(StopState.REFUSED) if self.is_refused else None
        self.accepted_at = sent_at
        self._note()
        self._report_accepted()
        return None

    def _poll(self, seconds: float | None = None) -> Op[bool]:
        """Fetch the run; return whether the server answered."""
        # By id as soon as it is known: by name the server would show a run that replaced this one.
        run_id = self.run.id if self.run is not None else self.target.run_id
        step = self._in_time(self.api.get_run(self.target.name, run_id), seconds)
        try:
            self.run = yield from call(step)
        except ServerError as error:
            self._fail(error)
            return False
        self._note()
        self._report_accepted()
        return True

    def _seen(self) -> Stopped | None:
        """Return the result if the last poll settles it, None if the stop must be sent or waited for."""
        run = self.run
        if run is None:
            if self.options.may_appear:
                self.is_missing = True
                # The stops sent so far met no run; a run that appears later needs its own.
                self.accepted_at = None
                return None
            return self._known(StopState.MISSING)
        self.is_missing = False
        # A deleted run can no longer be stopped, whatever status it still shows.
        if run.deleted and run.is_active:
            return self._known(StopState.MISSING)
        if not self.target.is_met_by(run):
            return self._known(StopState.OTHER_OWNER)
        if not run.is_active:
            return self._known(StopState.ENDED)
        if run.status.is_stopping:
            if self.options.until is Until.ENDED:
                # Another client's stop is as good as this one's: there is nothing to send.
                self.accepted_at = self.accepted_at or self.options.clock()
                return None
            return self._known(StopState.STOPPING)
        self.was_seen_running = self.accepted_at is not None
        return None

    def _is_due(self) -> bool:
        """Whether the stop has to be sent: for the first time, after a failure, or after it was dropped."""
        if self.accepted_at is None:
            return not self.is_missing
        if self.run is None or self.run.status.is_stopping:
            return False
        # Accepted, but the run is active and not stopping: the server is slow, or it dropped the stop.
        passed = self.options.clock() - self.accepted_at
        if passed >= REPEAT_SECONDS:
            return True
        if self.early_repeats and passed >= _EARLY_REPEAT_SECONDS:
            self.early_repeats -= 1
            return True
        return False

    def _note(self) -> None:
        if self.accepted_at is not None and self.run is not None:
            self.stops.note(self.run.id, abort=self.options.abort, at=self.accepted_at)

    def _report_accepted(self) -> None:
        """Call ``on_accepted``, unless the stop met no run, or one of another owner."""
        report, run = self.options.on_accepted, self.run
        if report is None or self.is_reported or self.accepted_at is None:
            return
        is_ours = self.target.run_id is not None if run is None else self.target.is_met_by(run)
        if is_ours:
            self.is_reported = True
            report(self._known(StopState.ACCEPTED).result)

    def _fail(self, error: ServerError) -> None:
        # Without a time limit the caller retries; after an accepted stop, what is known is worth more.
        if self.options.timeout is None and self.accepted_at is None:
            raise error
        self.is_refused = not isinstance(error, _MAY_PASS)
        is_transient = isinstance(error, TransientServerError)
        self.failure = ServerUnreachableError(error.message) if is_transient else error

    def _in_time(self, step: Call[T], seconds: float | None = None) -> Call[T]:
        if self.options.timeout is None:
            return step
        return step.within(self._left() if seconds is None else seconds)

    def seconds_left(self) -> float | None:
        """Return the seconds that the caller has left, None without a limit."""
        return None if self.options.timeout is None else self._left()

    def _left(self) -> float:
        return self.deadline - self.options.clock()

    def _pause(self, polls: int) -> float:
        if self.options.clock() - self.started > _SLOW_POLLS_AFTER:
            return _SLOW_PAUSE
        pause = _PAUSES[min(polls, len(_PAUSES) - 1)]
        # After a failure there is nothing to see yet, and a server that refuses connections should not be
        # hammered.
        return pause if self.accepted_at is not None else max(pause, _PAUSES[1])

    def _unconfirmed(self) -> Stopped:
        if self.run is not None and self.run.status.is_stopping:
            return self._known(StopState.STOPPING)
        return self._known(StopState.UNCONFIRMED)

    def _error(self, state: StopState) -> str | None:
        failure = None if self.failure is None else self.failure.message
        if state is not StopState.UNCONFIRMED:
            return failure
        within = f"within {round(self.options.timeout or 0.0, 1):g} s"
        if self.is_missing:
            return f"the run did not appear {within}; its submission may still be under way"
        if self.accepted_at is None:
            return failure or f"the server did not answer {within}"
        if self.was_seen_running:
            return f"the server accepted the stop ({self.requests} requests), but the run is still running"
        return f"the server accepted the stop, but did not show its effect {within}"

    def _known(self, state: StopState) -> Stopped:
        run, error = self.run, self._error(state)
        run_id = run.id if run is not None else self.target.run_id
        url = self.api.runs_url() if run_id is None else self.api.run_url(run_id)
        outcome = outcome_of(run, url) if run is not None and state is StopState.ENDED else None
        result = StopResult(self.target.name, url, state, self.requests, error, outcome, run_id)
        was_accepted = result.is_safe or self.accepted_at is not None
        return Stopped(result, None if was_accepted else self._failure(result))

    def _failure(self, result: StopResult) -> ServerError:
        return self.failure or ServerUnreachableError(f"{result.error}. See {result.url}")
