"""A budget that several runs share: what is spent, what is reserved, and whether one more fits."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from dstack_core.errors import DstackError
from dstack_core.models.money import format_usd


@dataclass(frozen=True, slots=True)
class BudgetState:
    """How much of a budget is spent, as the server's runs show it. All amounts are in USD.

    Attributes:
        max_cost: What all runs together may cost.
        spent: What they have cost so far, active ones included.
        reserved: What active runs with a ``max_cost`` may still cost.
        planned: What the next run may cost.
        runs: The number of runs so far.
    """

    max_cost: Decimal
    spent: Decimal
    reserved: Decimal
    planned: Decimal
    runs: int

    @property
    def left(self) -> Decimal:
        """What is neither spent nor reserved; below 0 if more was spent."""
        return self.max_cost - self.spent - self.reserved

    @property
    def fits(self) -> bool:
        """Whether the next run fits; one without a planned cost fits while anything is left."""
        return self.left > 0 and self.planned <= self.left

    @property
    def text(self) -> str:
        """Return it as a sentence for a log."""
        reserved = f", {format_usd(self.reserved)} are reserved for active ones" if self.reserved else ""
        planned = f", and the next run may cost {format_usd(self.planned)}" if self.planned else ""
        runs = f"{self.runs} run{'' if self.runs == 1 else 's'}"
        spent = f"{format_usd(self.spent)} are spent by {runs}"
        return f"Of the budget of {format_usd(self.max_cost)}, {spent}{reserved}{planned}."

    def raise_for_status(self) -> None:
        """Raise ``BudgetSpentError`` unless the next run fits."""
        if not self.fits:
            raise BudgetSpentError(f"{self.text} Raise the budget, or plan a cheaper run.", self)


class BudgetSpentError(DstackError):
    """A run that does not fit into its budget any more; nothing was submitted. ``state`` has the amounts."""

    def __init__(self, message: str, state: BudgetState) -> None:
        super().__init__(message)
        self.state = state

    def __reduce__(self) -> tuple[type[BudgetSpentError], tuple[str, BudgetState]]:
        """Keep the amounts when the error is pickled, such as for another process."""
        return type(self), (self.message, self.state)
