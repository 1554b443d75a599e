"""Retries and time limits: wrappers around a flow, of which the flow itself knows nothing.

The problem: a server restarts, a proxy sends its own error page, a network breaks for a minute. The run keeps
running meanwhile, so a caller that follows it should survive all that, but fail soon if the address is wrong.

The idea of ``retrying``: it sits between a flow and its driver. When an idempotent call fails with a fault
that may pass, it yields pauses and the same call until there is an answer, and the flow sees only the answer.
Each call has its own ``Patience``: the budget bounds one outage of the server, not all of them together.

The idea of ``within``: it shortens every pause, wait and request to what is left of the time, and raises from
the first pause that would begin after the limit. So a limit of 0 still allows one round of polling.

Invariants: a call that is not idempotent is sent once; the flow decides what a lost reply means. The budget
counts from the first failed try, so that a request that used up its whole time limit still gets a second try.
Without a single good answer from this server, a reply that is not dstack's is retried only twice: the address
is probably wrong. A fault of a poll that many waits share costs each follower one poll of its own, not its
wait. A flow is closed with its wrapper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util.retry import Retry

from dstack_core._flow.steps import Flow, Sleep, Wait
from dstack_core._wire.http_messages import Call
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import ProtocolError, ServerUnreachableError, TransientServerError, WaitTimeoutError
from dstack_core.models.events import ContactLost, ContactRestored, Event
from dstack_core.models.progress import Progress

T = TypeVar("T")

# The first retry comes at once, the next ones after 0.5 s, 1 s, 2 s and so on, each with up to 0.75 s of
# jitter, which keeps thousands of followers from reaching a restarted server in the same moment. A server
# that is back is noticed up to 20 s late; a lower maximum adds load to one that is struggling.
_BACKOFF = Retry(total=None, backoff_factor=0.25, backoff_max=20, backoff_jitter=0.75)
# A server may ask for a pause in ``Retry-After``. Without a limit, a date in the far future would use up the
# whole budget in one sleep; a short one would ignore the usual "in a minute".
_LONGEST_RETRY_AFTER = 120.0
# Enough to survive one reply that a proxy broke, and soon exhausted if the address is simply wrong. More
# tries delay the error for a mistyped address.
_TRIES_WITH_A_STRANGER = 3


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """The time to retry for an unreachable server: ``seconds`` on ``clock``, from the first failed try."""

    seconds: float
    clock: Callable[[], float]


class Patience:
    """The pauses after the faults of one call, until the budget is spent.

    They grow with jitter up to 20 s and honour ``Retry-After`` up to 120 s.
    """

    def __init__(self, budget: RetryBudget) -> None:
        self._budget = budget
        self._started: float | None = None
        self._backoff = _BACKOFF

    @property
    def was_needed(self) -> bool:
        """Return whether there was any fault."""
        return bool(self._backoff.history)

    @property
    def silent_for(self) -> float:
        """Return the seconds since the first failed try."""
        return 0.0 if self._started is None else self._budget.clock() - self._started

    @property
    def left(self) -> float:
        """Return the seconds until the budget is spent."""
        return max(0.0, self._budget.seconds - self.silent_for)

    def after(self, error: TransientServerError | ProtocolError) -> float:
        """Return the seconds to wait; raises ``ServerUnreachableError`` when the budget is spent."""
        if self._started is None:
            # A first try that waited for its whole time limit must not have spent the budget alone.
            self._started = self._budget.clock()
        # urllib3's own retry object counts and computes the pauses; it is never given to urllib3.
        self._backoff = self._backoff.increment(error=HTTPError(error.message))
        wait = self._backoff.get_backoff_time()
        if isinstance(error, TransientServerError):
            wait = max(wait, _asked_wait(error))
        if self.left <= 0:
            raise ServerUnreachableError(
                f"{error.message}. Tried {len(self._backoff.history)} times in {self.silent_for:.0f} s "
                f"(retry budget {self._budget.seconds:.0f} s). Check that the server runs and that its "
                "address is right"
            ) from error
        return min(wait, self.left)


def retrying(flow: Flow[T], budget: RetryBudget, progress: Progress | None = None) -> Flow[T]:
    """Run ``flow`` and try its idempotent calls again on faults that may pass.

    A reply that is not a dstack server's (an empty or cut one, a proxy's page, a login page) is such a fault
    if the server has answered this flow correctly before. If it has not, the call is retried twice, then its
    ``ProtocolError`` is raised into the flow. ``progress`` is what the ``ContactLost`` events carry until the
    flow has reported its own. A call that is not idempotent is not repeated: the flow sees
    ``TransientServerError``. Raises ``ServerUnreachableError`` into the flow once ``budget`` is spent.
    """
    answer: Any = None
    failure: Exception | None = None
    is_known = False
    while True:
        try:
            step = flow.send(answer) if failure is None else flow.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer, failure = None, None
        try:
            if isinstance(step, Wait):
                answer = yield from _waiting(step, budget, progress, is_known)
                is_known = True
            elif isinstance(step, Call) and step.idempotent:
                answer = yield from _persistent(step, budget, progress, is_known)
                is_known = True
            elif isinstance(step, Call):
                answer = yield from _once(step)
                is_known = True
            else:
                if isinstance(step, Event):
                    progress = step.progress
                answer = yield step
        except GeneratorExit:
            flow.close()
            raise
        except Exception as error:
            failure = error


def _waiting(
    wait: Wait, budget: RetryBudget, progress: Progress | None, is_known: bool
) -> Flow[RunSnapshot | None]:
    """Wait; if faults cut the wait short, continue it until the first one was due.

    So a fault that many waits have in common does not end them all, and faults at every poll do not postpone
    the end of a wait.
    """
    end = budget.clock() + wait.due
    while True:
        try:
            waited: RunSnapshot | None = yield wait
            return waited
        except (TransientServerError, ProtocolError) as error:
            fault = error
        # The fault may be that of a page that hundreds of runs share. The error of the run's own poll names
        # the run.
        run = yield from _persistent(wait.poll, budget, progress, is_known, fault)
        is_known = True
        left = end - budget.clock()
        if left <= 0 or wait.ends_with(run):
            return run
        wait = replace(wait, due=left, due_in_crowd=None)


def _persistent(
    call: Call[T],
    budget: RetryBudget,
    progress: Progress | None,
    is_known: bool,
    fault: TransientServerError | ProtocolError | None = None,
) -> Flow[T]:
    """Try a call until it succeeds; ``fault`` is the fault of a first try that was already made."""
    patience = Patience(budget)
    strange = 0
    while True:
        try:
            if fault is not None:
                raise fault
            answer: T = yield call
        except (TransientServerError, ProtocolError) as met:
            error, fault = _placed(met, call.place), None
            if isinstance(error, ProtocolError) and not is_known:
                strange += 1
                if strange >= _TRIES_WITH_A_STRANGER:
                    raise
            wait = _wait_after(error, patience)
            if progress is not None:
                yield ContactLost(progress, error.message, patience.silent_for, patience.left)
            yield Sleep(wait)
        else:
            if patience.was_needed and progress is not None:
                yield ContactRestored(progress, patience.silent_for)
            return answer


def _wait_after(error: TransientServerError | ProtocolError, patience: Patience) -> float:
    """Return the seconds to wait. When the budget is spent, raise the error that explains more."""
    try:
        return patience.after(error)
    except ServerUnreachableError:
        # A page of something that is not dstack explains more than "unreachable": the server did answer.
        if isinstance(error, ProtocolError):
            raise error from None
        raise


def _once(step: Call[Any]) -> Flow[Any]:
    try:
        return (yield step)
    except TransientServerError as error:
        raise _placed(error, step.place) from None


def _placed(error: TransientServerError | ProtocolError, place: str) -> TransientServerError | ProtocolError:
    """Return a transport's fault with the server, project and run it happened at."""
    if isinstance(error, ProtocolError) or place in error.message:
        return error
    return TransientServerError(f"{place}: {error.message}", retry_after=error.retry_after)


def _asked_wait(error: TransientServerError) -> float:
    if error.retry_after is None:
        return 0.0
    try:
        return min(_BACKOFF.parse_retry_after(error.retry_after), _LONGEST_RETRY_AFTER)
    except InvalidHeader:
        # Proxies send all kinds of values here; then this client's own backoff applies.
        return 0.0


# The time that each request of the last round of polling may still take after the limit, so that a limit of 0
# means one round. Less fails on a slow server; more exceeds the caller's limit by as much.
_LAST_REQUEST_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """A limit of ``seconds`` on ``clock`` for a whole flow.

    ``what`` begins the message of the ``WaitTimeoutError``, ``page`` is where a person finds the run, "" for
    a flow without a run. ``last_request`` (seconds) is the time that each request that begins near the limit,
    or after it, may still take.
    """

    seconds: float
    what: str
    page: str
    clock: Callable[[], float]
    last_request: float = _LAST_REQUEST_SECONDS

    def error(self, lost: str | None) -> WaitTimeoutError:
        """Return the error for a limit that has passed; ``lost`` is why the last request got no answer."""
        if lost is not None:
            running = f" It may still be running: {self.page}" if self.page else ""
            return WaitTimeoutError(f"{self.what}, and the server does not answer ({lost}).{running}")
        return WaitTimeoutError(f"{self.what}. It keeps running: {self.page}" if self.page else self.what)


def within(flow: Flow[T], limit: TimeLimit | None) -> Flow[T]:
    """Run ``flow``; with a limit, raise ``WaitTimeoutError`` from the first sleep that begins after it.

    Requests end with the limit, too, and ``ContactLost`` promises no retries beyond it.
    """
    if limit is None:
        return (yield from flow)
    deadline = limit.clock() + limit.seconds
    answer: Any = None
    failure: Exception | None = None
    lost: str | None = None
    wait: Wait | None = None
    until = 0.0
    try:
        while True:
            try:
                step = wait or (flow.send(answer) if failure is None else flow.throw(failure))
            except StopIteration as end:
                result: T = end.value
                return result
            answer, failure = None, None
            left = deadline - limit.clock()
            if isinstance(step, Sleep | Wait) and left <= 0:
                raise limit.error(lost)
            if isinstance(step, Sleep):
                step = replace(step, seconds=min(step.seconds, left))
            elif isinstance(step, Wait):
                if wait is None:
                    # Polls come a little early or late; half an interval makes sure that the last one within
                    # the flow's own due time ends the wait, and that no other is added.
                    wait, until = step, limit.clock() + step.due - step.interval / 2
                # One poll at a time, since each has less time left for its reply.
                due = min(step.interval, step.due, left)
                poll = step.poll.within(max(left - due, limit.last_request))
                step = replace(step, due=due, due_in_crowd=None, poll=poll)
            elif isinstance(step, Call):
                step = step.within(max(left, limit.last_request))
            elif isinstance(step, ContactLost):
                lost = step.error
                # What the user reads must not promise retries beyond the limit.
                step = replace(step, gives_up_in=max(0.0, min(step.gives_up_in, left)))
            try:
                answer = yield step
            except Exception as error:
                # Faults of a wait belong to the flow, which may be ``retrying``: it yields the rest again.
                failure, wait = error, None
            else:
                lost = None if isinstance(step, Call | Wait) else lost
                if wait is not None and (wait.ends_with(answer) or limit.clock() >= until):
                    wait = None
    finally:
        flow.close()
