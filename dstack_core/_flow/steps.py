"""The steps a flow is made of.

The problem: every flow exists for blocking callers and for an event loop, and a loop that is written twice
drifts apart.

The idea: a flow is a generator. It yields what it needs (a request, a pause, a wait for news) or an event to
report, and a driver, ``_drive`` or ``_adrive``, carries that out and sends the result back in. What a step
raises is thrown into the flow at its ``yield``. Wrappers such as ``retrying`` and ``within`` are generators
around a flow that change or repeat its steps.

Invariants: a flow does no I/O and reads no clock that it was not given, so tests run it with a scripted
server and without waiting. Each wrapper closes the flow it wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from dstack_core._wire.http_messages import Call
from dstack_core._wire.runs import RunSnapshot
from dstack_core.models.events import Event

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sleep:
    """A pause of ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Do(Generic[T]):
    """An ``action`` that may block, such as opening an SSH connection; the answer is what it returns."""

    action: Callable[[], T]


# Timers and clocks are a little off. Without this share of an interval, a wait of 12 intervals could be one
# of 11; half an interval or more would add a poll that is not due.
_TOLERANCE_SHARE = 0.05


class IsNews(Protocol):
    """A test for news of a run."""

    def __call__(self, run: RunSnapshot, /) -> bool:
        """Return whether what a poll shows is news."""

    def when_unchanged(self, run_id: str) -> bool:
        """Return whether a poll is news although it shows the same as the one before."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait for news of a run; the answer is what the last poll showed, None for a run that is gone.

    Every ``interval`` seconds comes a ``poll``. The first one that shows news ends the wait, and so does the
    last one within ``due`` seconds, whatever it shows; ``due_in_crowd`` replaces ``due`` where many runs are
    followed together. When exactly the polls come, and whether one request
    serves several waits, is up to the one that carries the wait out.
    """

    poll: Call[RunSnapshot | None]
    is_news: IsNews
    interval: float
    due: float
    due_in_crowd: float | None = None

    @property
    def polls(self) -> int:
        """How many polls there are until the wait is due."""
        return max(1, int(self.due / self.interval + _TOLERANCE_SHARE))

    def in_crowd(self) -> Wait:
        """Return the wait as it is where many runs are followed together."""
        return self if self.due_in_crowd is None else replace(self, due=self.due_in_crowd, due_in_crowd=None)

    def ends_with(self, run: RunSnapshot | None) -> bool:
        """Whether a poll that shows ``run`` ends the wait before it is due."""
        return run is None or self.is_news(run)


Op: TypeAlias = Generator[Call[Any] | Sleep, Any, T]
"""Several requests with one result. The driver answers a ``Call`` with its parsed reply, or throws."""

Flow: TypeAlias = Generator[Call[Any] | Sleep | Wait | Do[Any] | Event, Any, T]
"""An ``Op`` that also reports events, waits for news, and runs blocking code on its way."""


def call(step: Call[T]) -> Generator[Call[Any] | Sleep, Any, T]:
    """Do one call; keeps its type through ``yield from``."""
    result: T = yield step
    return result


def do(action: Callable[[], T]) -> Generator[Do[Any], Any, T]:
    """Run one blocking action; keeps its type through ``yield from``."""
    result: T = yield Do(action)
    return result


def alone(flow: Flow[T]) -> Generator[Call[Any] | Sleep | Do[Any] | Event, Any, T]:
    """Carry out the waits of ``flow`` with sleeps and polls of its own: for drivers that share no polls."""
    answer: Any = None
    failure: Exception | None = None
    while True:
        try:
            step = flow.send(answer) if failure is None else flow.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer, failure = None, None
        try:
            # Only a wait is carried out here. Everything else is the driver's, errors included.
            answer = (yield from _polls(step)) if isinstance(step, Wait) else (yield step)
        except GeneratorExit:
            flow.close()
            raise
        except Exception as error:
            failure = error


def _polls(wait: Wait) -> Generator[Call[Any] | Sleep, Any, RunSnapshot | None]:
    left = wait.polls
    while True:
        # A wait may be due before its first interval has passed, for example at a time limit.
        yield Sleep(min(wait.interval, wait.due))
        run = yield from call(wait.poll)
        left -= 1
        if left <= 0 or wait.ends_with(run):
            return run


def changing(flow: Flow[T], change: Callable[[Any], Any]) -> Generator[Any, Any, T]:
    """Carry out what ``change`` returns for each step of ``flow``; None drops an event.

    What ``change`` raises ends the flow.
    """
    answer: Any = None
    failure: Exception | None = None
    try:
        while True:
            step = flow.send(answer) if failure is None else flow.throw(failure)
            answer, failure = None, None
            step = change(step)
            if step is None:
                continue
            try:
                answer = yield step
            except Exception as error:
                failure = error
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        flow.close()


def observing(flow: Flow[T], see: Callable[[object], None]) -> Flow[T]:
    """Pass each step of ``flow`` to ``see`` before it is carried out."""

    def show(step: Any) -> Any:
        see(step)
        return step

    return changing(flow, show)
