"""Read a reply: a refusal becomes an error, and so does what no dstack server answers.

Thousands of flows keep a call each while they rest: one of these is one object, where a closure is many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dstack_core._wire.plain import Reply
from dstack_core._wire.refusals import Place, raise_for_refusal
from dstack_core.errors import ProtocolError, RunNotFoundError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parse(Generic[T]):
    """Read the JSON of a reply with ``read``; ``path`` is what was asked."""

    place: Place
    path: str
    read: Callable[[Any], T]

    def __call__(self, reply: Reply) -> T:
        """Return what it says. Raises the server errors."""
        raise_for_refusal(reply, self.place)
        try:
            return self.read(reply.json())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ProtocolError(
                f"{self.place} sent an unexpected reply to {self.path} "
                f"({type(error).__name__}: {error}). Is this the address of a dstack server?"
            ) from error


@dataclass(frozen=True, slots=True)
class NoneWhenMissing(Generic[T]):
    """Do ``parse``; a run that is not there is None."""

    parse: Callable[[Reply], T]

    def __call__(self, reply: Reply) -> T | None:
        """Return what it says. Raises the other server errors."""
        try:
            return self.parse(reply)
        except RunNotFoundError:
            return None
