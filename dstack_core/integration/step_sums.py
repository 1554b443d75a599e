"""The attempts, the cost and the duration of all steps of a job so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dstack_core.models.run_attempt import RunAttempt

if TYPE_CHECKING:
    from dstack_core.models.outcome import Outcome


@dataclass(slots=True)
class StepSums:
    """What the steps of a job that have ended add up to; JSON carries it to another process.

    Attributes:
        attempts: The attempts of all steps, whose numbers count on.
        cost: What the steps cost, in USD.
        seconds: How long they took together.
    """

    attempts: list[RunAttempt] = field(default_factory=list)
    cost: float = 0.0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> StepSums:
        """Read back what ``to_dict`` returned, here or in another version."""
        known = data or {}
        attempts = [RunAttempt.from_dict(each) for each in known.get("attempts") or ()]
        return cls(attempts, float(known.get("cost") or 0.0), float(known.get("seconds") or 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as values that JSON has."""
        return {
            "attempts": [each.to_dict() for each in self.attempts],
            "cost": self.cost,
            "seconds": self.seconds,
        }

    @property
    def count(self) -> int:
        """The number of the last attempt, 0 before the first."""
        return max((each.number for each in self.attempts), default=0)

    def add(self, outcome: Outcome) -> None:
        """Add a step that has ended."""
        earlier = self.count
        self.attempts += [replace(each, number=each.number + earlier) for each in outcome.attempts]
        self.cost += outcome.cost
        self.seconds += outcome.duration or 0.0

    def of_all(self, outcome: Outcome) -> Outcome:
        """Return the outcome of the last step with the attempts, the cost and the duration of all."""
        return replace(
            outcome,
            attempts=tuple(self.attempts),
            cost=round(self.cost, 6),
            duration=outcome.duration if outcome.duration is None else self.seconds,
        )
