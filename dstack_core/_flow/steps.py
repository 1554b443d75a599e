"""The steps a flow is made of."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from dstack_core._wire.plain import Call
from dstack_core.models.events import Event

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sleep:
    """Ask the driver to wait; ``seconds`` is how long."""

    seconds: float


Op: TypeAlias = Generator[Call[Any] | Sleep, Any, T]
"""Several requests with one result. The driver answers a ``Call`` with its parsed reply, or throws."""

Flow: TypeAlias = Generator[Call[Any] | Sleep | Event, Any, T]
"""An ``Op`` that also reports events on its way."""


def call(step: Call[T]) -> Generator[Call[Any] | Sleep, Any, T]:
    """Do one call; keeps its type through ``yield from``."""
    result: T = yield step
    return result
