"""Carry out a flow's steps in an event loop: the async twin of ``_drive``.

It is a file of its own since asyncio is slow to import: a blocking client must not pay for it. With ``wait``,
a transport that shares polls (``_shared``) carries out the waits; without, each flow sleeps and polls alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from dstack_core import clock
from dstack_core._drive import OnEvent, log_event
from dstack_core._flow.steps import Do, Flow, Sleep, Wait, alone
from dstack_core._wire.http_messages import Call, Reply, Request
from dstack_core.models.events import Event
from dstack_core.models.options import check_callable

T = TypeVar("T")

AsyncSend = Callable[[Request], Awaitable[Reply]]
AsyncWait = Callable[[Wait], Awaitable[Reply]]


async def aiterate(
    flow: Flow[Any],
    send: AsyncSend,
    sleep: Callable[[float], Awaitable[None]] = clock.asleep,
    wait: AsyncWait | None = None,
) -> AsyncGenerator[Event, None]:
    """Yield the flow's events: the twin of ``iterate``. An async generator returns no result.

    ``wait`` carries out a ``Wait`` together with others and returns the reply to the poll that ended it.
    """
    flow = flow if wait else alone(flow)
    answer: Any = None
    failure: Exception | None = None
    try:
        while True:
            step = flow.send(answer) if failure is None else flow.throw(failure)
            answer, failure = None, None
            if isinstance(step, Call):
                try:
                    answer = step.parse(await send(step.request))
                except Exception as error:
                    failure = error
            elif isinstance(step, Do):
                # It may block, for example on an SSH connection, and must not hold up the loop.
                try:
                    answer = await asyncio.to_thread(step.action)
                except Exception as error:
                    failure = error
            elif isinstance(step, Sleep):
                await sleep(step.seconds)
            elif wait is not None and isinstance(step, Wait):
                try:
                    answer = step.poll.parse(await wait(step))
                except Exception as error:
                    failure = error
            elif isinstance(step, Event):
                yield step
    except StopIteration:
        return
    finally:
        flow.close()


async def arun(
    flow: Flow[T],
    send: AsyncSend,
    sleep: Callable[[float], Awaitable[None]] | None = None,
    on_event: OnEvent | None = None,
    wait: AsyncWait | None = None,
) -> T:
    """Return the flow's result; the twin of ``run``."""
    check_callable("sleep", sleep)
    check_callable("on_event", on_event)
    result: list[T] = []
    report = on_event or log_event

    # An async generator cannot return a value, so a flow around the flow keeps it.
    def keep() -> Flow[None]:
        result.append((yield from flow))

    async with aclosing(aiterate(keep(), send, sleep or clock.asleep, wait)) as events:
        async for event in events:
            report(event)
    return result[0]
