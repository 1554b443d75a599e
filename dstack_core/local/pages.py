"""Pages of lists that are sorted by their creation."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from dstack_core.local.resource_bodies import Page


class _Created(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> datetime: ...


Item = TypeVar("Item", bound=_Created)


def page_of(items: Iterable[Item], request: Page) -> list[Item]:
    """Return a page of items, newest first by default."""
    found = sorted(items, key=_key, reverse=not request.ascending)
    if request.prev_created_at is not None:
        previous = request.prev_created_at
        if previous.tzinfo is None:
            previous = previous.replace(tzinfo=UTC)
        edge = (previous, str(request.prev_id or ""))
        found = [one for one in found if (_key(one) > edge if request.ascending else _key(one) < edge)]
    return found[: request.limit]


def _key(item: _Created) -> tuple[datetime, str]:
    return item.created_at, item.id
