"""The end of a run that cost as much as it may.

A server has no word for it: it shows the stop of a follower, or the ``max_duration`` that the limit gave.
"""

from __future__ import annotations

from dataclasses import replace

from dstack_core.models.cost_limits import MAX_COST_REASON, CostLimit
from dstack_core.models.outcome import Outcome
from dstack_core.models.statuses import RunStatus

_STOPPED = ("stopped_by_user", "terminated_by_user")


def at_cost_limit(outcome: Outcome, limit: CostLimit) -> Outcome:
    """Return the outcome of a run that ended because of its cost limit as a failure of its own."""
    is_spent = outcome.cost >= limit.max_cost
    is_guarded = outcome.category == "limit.max_duration" and limit.guard is not None
    if not is_guarded and not (is_spent and outcome.reason in _STOPPED):
        return outcome
    return replace(
        outcome,
        status=RunStatus.FAILED,
        reason=MAX_COST_REASON,
        message=limit.reached(outcome.cost) if is_spent else limit.guarded(outcome.cost),
        # These follow from the reason.
        category="",
        cause="",
        next_step="",
    )
