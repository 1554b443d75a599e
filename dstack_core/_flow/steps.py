"""The steps a flow is made of."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from dstack_core._wire.plain import Call
from dstack_core._wire.runs import RunSnapshot
from dstack_core.models.events import Event

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sleep:
    """Ask the driver to wait; ``seconds`` is how long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Do(Generic[T]):
    """Ask the driver to run ``action``, which may block, and to answer with what it returns."""

    action: Callable[[], T]


@dataclass(frozen=True, slots=True)
class Rest:
    """Ask the driver to wait ``seconds`` and to ``look`` then; the answer is a ``Rested``.

    Where looks are shared, one that ``is_news`` denies need not end the rest: the next comes ``interval``
    seconds later, until there were ``rounds``.
    """

    seconds: float
    look: Call[RunSnapshot | None]
    is_news: Callable[[RunSnapshot], bool]
    interval: float
    rounds: int


class Rested(NamedTuple):
    """Hold what was seen at the end of a rest, and how many looks it took."""

    run: RunSnapshot | None
    rounds: int


Op: TypeAlias = Generator[Call[Any] | Sleep, Any, T]
"""Several requests with one result. The driver answers a ``Call`` with its parsed reply, or throws."""

Flow: TypeAlias = Generator[Call[Any] | Sleep | Rest | Do[Any] | Event, Any, T]
"""An ``Op`` that also reports events, rests, and runs blocking code on its way."""


def call(step: Call[T]) -> Generator[Call[Any] | Sleep, Any, T]:
    """Do one call; keeps its type through ``yield from``."""
    result: T = yield step
    return result


def do(action: Callable[[], T]) -> Generator[Do[Any], Any, T]:
    """Run one blocking action; keeps its type through ``yield from``."""
    result: T = yield Do(action)
    return result
