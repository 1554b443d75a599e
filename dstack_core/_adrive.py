"""Wait in an event loop: the async twin of ``_drive``, apart from it since asyncio is slow to import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from dstack_core._drive import OnEvent, log_event
from dstack_core._flow.steps import Do, Flow, Rest, Rested, Sleep
from dstack_core._wire.plain import Call, Reply, Request
from dstack_core.models.checks import check_callable
from dstack_core.models.events import Event

T = TypeVar("T")

AsyncSend = Callable[[Request], Awaitable[Reply]]
AsyncRest = Callable[[Rest], Awaitable[tuple[Reply, int]]]


async def aiterate(
    flow: Flow[Any],
    send: AsyncSend,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    rest: AsyncRest | None = None,
) -> AsyncGenerator[Event, None]:
    """Yield the flow's events: the twin of ``iterate``, whose result rides on the last event.

    ``rest`` does a ``Rest`` together with others; it gives the reply to its look and how many looks it took.
    """
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
                try:
                    answer = await asyncio.to_thread(step.action)
                except Exception as error:
                    failure = error
            elif isinstance(step, Sleep):
                await sleep(step.seconds)
            elif isinstance(step, Rest):
                if rest is None:
                    await sleep(step.seconds)
                try:
                    reply, rounds = await (rest(step) if rest else _sent(send, step))
                    answer = Rested(step.look.parse(reply), rounds)
                    del reply
                except Exception as error:
                    failure = error
            else:
                yield step
    except StopIteration:
        return
    finally:
        flow.close()


async def _sent(send: AsyncSend, step: Rest) -> tuple[Reply, int]:
    return await send(step.look.request), 1


async def arun(
    flow: Flow[T],
    send: AsyncSend,
    sleep: Callable[[float], Awaitable[None]] | None = None,
    on_event: OnEvent | None = None,
) -> T:
    """Return the flow's result: the twin of ``run``."""
    check_callable("sleep", sleep)
    check_callable("on_event", on_event)
    result: list[T] = []
    report = on_event or log_event

    def keep() -> Flow[None]:
        result.append((yield from flow))

    async with aclosing(aiterate(keep(), send, sleep or asyncio.sleep)) as events:
        async for event in events:
            report(event)
    return result[0]
