"""Carry out a flow's steps in a blocking caller; ``_adrive`` is the async twin.

The flows decide what happens, the drivers only wait: a ``Call`` is sent and read, a ``Sleep`` slept, a ``Do``
run, and an event handed to the caller. The result, or what was raised, goes back into the flow. The driver
knows no retry and no time limit: those wrap the flow (``_flow.retry``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, TypeVar

from dstack_core import clock
from dstack_core._flow.steps import Do, Flow, Sleep, alone
from dstack_core._wire.http_messages import Call, Reply, Request
from dstack_core.models.events import ContactLost, ContactRestored, Event
from dstack_core.models.options import check_callable

T = TypeVar("T")

Send = Callable[[Request], Reply]

_log = logging.getLogger("dstack_core")


OnEvent = Callable[[Event], None]


def iterate(
    flow: Flow[T], send: Send, sleep: Callable[[float], None] = clock.sleep
) -> Generator[Event, None, T]:
    """Yield the flow's events and return its result; what ``send`` or ``parse`` raises goes into the flow.

    The flow is closed before anything else leaves, such as ``KeyboardInterrupt`` or what ``sleep`` raises: it
    may have something left to log.
    """
    steps = alone(flow)
    answer: Any = None
    failure: Exception | None = None
    try:
        while True:
            step = steps.send(answer) if failure is None else steps.throw(failure)
            answer, failure = None, None
            if isinstance(step, Call):
                try:
                    answer = step.parse(send(step.request))
                except Exception as error:
                    failure = error
            elif isinstance(step, Do):
                try:
                    answer = step.action()
                except Exception as error:
                    failure = error
            elif isinstance(step, Sleep):
                sleep(step.seconds)
            else:
                yield step
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        # A flow that is only dropped would be closed when the garbage collector finds it.
        steps.close()


def run(
    flow: Flow[T],
    send: Send,
    sleep: Callable[[float], None] | None = None,
    on_event: OnEvent | None = None,
) -> T:
    """Return the flow's result; its events go to ``on_event``, by default to the log."""
    check_callable("sleep", sleep)
    check_callable("on_event", on_event)
    report = on_event or log_event
    with closing(iterate(flow, send, sleep or clock.sleep)) as events:
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                result: T = end.value
                return result
            report(event)


def log_event(event: Event) -> None:
    """Log the events that a caller who waits for a result needs: the server's absence and return."""
    if isinstance(event, ContactLost):
        error, seconds = event.error.rstrip("."), round(event.gives_up_in)
        # No seconds are left at a time limit: an error follows, and no retry may be announced.
        if seconds:
            _log.warning("%s. Retrying for another %s s.", error, seconds)
        else:
            _log.warning("%s.", error)
    elif isinstance(event, ContactRestored):
        _log.info("The dstack server answers again after %.0f s.", event.silent_for)
