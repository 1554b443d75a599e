"""A run as a dict of JSON-plain values: what tasks hand to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstack_core import AsyncRun, Run


def info(run: Run | AsyncRun) -> dict[str, Any]:
    """Return the run as of the last poll; makes no request."""
    from dstack_core.integration import outcome_dict

    outcome = run.outcome()
    return {
        "run_name": run.name,
        "run_id": run.id,
        "status": str(run.last_status),
        "url": run.url,
        "service_url": run.service_url,
        "marker": run.marker,
        "outcome": None if outcome is None else outcome_dict(outcome),
    }
