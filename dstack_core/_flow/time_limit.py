"""Run a flow within the time its caller has: a wrapper around a flow that the flow does not know of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dstack_core._flow.steps import Flow, Sleep, Wait
from dstack_core._wire.plain import Call
from dstack_core.errors import WaitTimeoutError
from dstack_core.models.events import ContactLost

T = TypeVar("T")

# What a round of polling that has begun may still take for each request, so that a limit of 0 means one
# round.
_LAST_REQUEST_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """``seconds`` on ``clock`` for a whole flow.

    ``what`` is what the ``WaitTimeoutError`` says first, ``page`` is where a person finds the run, "" for a
    flow without a run. ``last_request`` (seconds) is what each request that begins near the limit, or behind
    it, may still take.
    """

    seconds: float
    what: str
    page: str
    clock: Callable[[], float]
    last_request: float = _LAST_REQUEST_SECONDS

    def error(self, lost: str | None) -> WaitTimeoutError:
        """Return the error for a limit that has passed; ``lost`` is why the server did not answer last."""
        if lost is not None:
            running = f" It may still be running: {self.page}" if self.page else ""
            return WaitTimeoutError(f"{self.what}, and the server does not answer ({lost}).{running}")
        return WaitTimeoutError(f"{self.what}. It keeps running: {self.page}" if self.page else self.what)


def within(flow: Flow[T], limit: TimeLimit | None) -> Flow[T]:
    """Run ``flow``; with a limit, raise ``WaitTimeoutError`` from the first sleep that begins behind it.

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
                    wait, until = step, limit.clock() + step.due - step.interval / 2
                # One poll at a time, since the time for its reply is another for each.
                due = min(step.interval, step.due, left)
                poll = step.poll.within(max(left - due, limit.last_request))
                step = replace(step, due=due, poll=poll)
            elif isinstance(step, Call):
                step = step.within(max(left, limit.last_request))
            elif isinstance(step, ContactLost):
                lost = step.error
                step = replace(step, gives_up_in=max(0.0, min(step.gives_up_in, left)))
            try:
                answer = yield step
            except Exception as error:
                failure, wait = error, None
            else:
                lost = None if isinstance(step, Call | Wait) else lost
                if wait is not None and (wait.ends_with(answer) or limit.clock() >= until):
                    wait = None
    finally:
        flow.close()
