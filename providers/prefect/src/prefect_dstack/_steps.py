"""Steps on a client, written once as generators; the sync and the async task wait for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the client something: ``question`` gets a client and returns the answer, or awaits it."""

    question: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for ``seconds``."""

    seconds: float


Steps: TypeAlias = Generator[Ask | Pause, Any, T]


def drive(steps: Steps[T], client: Any, sleep: Callable[[float], None]) -> T:
    """Return the result of ``steps``, asking ``client``; its errors go into the steps."""
    answer: Any = None
    failure: Exception | None = None
    while True:
        try:
            step = steps.send(answer) if failure is None else steps.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer, failure = None, None
        if isinstance(step, Pause):
            sleep(step.seconds)
            continue
        try:
            answer = step.question(client)
        except Exception as error:
            failure = error


async def adrive(steps: Steps[T], client: Any, sleep: Callable[[float], Awaitable[None]]) -> T:
    """Return the result of ``steps``: the twin of ``drive``."""
    answer: Any = None
    failure: Exception | None = None
    while True:
        try:
            step = steps.send(answer) if failure is None else steps.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer, failure = None, None
        if isinstance(step, Pause):
            await sleep(step.seconds)
            continue
        try:
            answer = await step.question(client)
        except Exception as error:
            failure = error
