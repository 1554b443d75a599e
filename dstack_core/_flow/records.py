"""Read a run's events, page by page (PROTOCOL 1.9)."""

from __future__ import annotations

from dstack_core._flow.steps import Op, call
from dstack_core._wire.api import PAGE_SIZE, Api
from dstack_core.errors import ConfigurationError, ProtocolError
from dstack_core.models.records import EventRecord

# A server keeps one value in ten seconds, and for hours at most.
MOST_VALUES = 10_000


def list_events(api: Api, run_id: str, limit: int | None) -> Op[list[EventRecord]]:
    """Return the run's newest events, ``limit`` of them or all, oldest first."""
    most = None if limit is None else check_limit(limit)
    events: list[EventRecord] = []
    while most is None or len(events) < most:
        size = PAGE_SIZE if most is None else min(PAGE_SIZE, most - len(events))
        page = yield from call(api.list_events(run_id, limit=size, after=events[-1] if events else None))
        if events and page and page[-1].id == events[-1].id:
            raise ProtocolError(f"{api.server_url} gives the same page of events again and again")
        events += page
        if len(page) < size:
            break
    return events[::-1]


def check_limit(limit: int) -> int:
    """Return ``limit``, or raise ``ConfigurationError``."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"limit: {limit!r} is no limit; write a number above 0, or None for all")
    return limit
