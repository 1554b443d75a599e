"""Tell a run as a dict of JSON-plain values: what tasks hand to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstack_core import AsyncRun, Run


def info(run: Run) -> dict[str, Any]:
    """Return the run as of now. Raises the server errors."""
    return _told(run, str(run.status()))


async def ainfo(run: AsyncRun) -> dict[str, Any]:
    """Return the run as of now: the twin of ``info``."""
    return _told(run, str(await run.status()))


def _told(run: Run | AsyncRun, status: str) -> dict[str, Any]:
    outcome = run.outcome()
    return {
        "run_name": run.name,
        "run_id": run.id,
        "status": status,
        "url": run.url,
        "service_url": run.service_url,
        "marker": run.marker,
        "outcome": None if outcome is None else outcome.to_dict(),
    }
