"""A limit on what a run may cost, which travels with the run in its environment.

Every process that follows the run finds the limit there, whichever one submitted it: a trigger after a
restart, another try, a person with ``runs.get``. The commands see it, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstack_core.errors import ConfigurationError
from dstack_core.models.durations import format_duration
from dstack_core.models.money import format_usd

MAX_COST_VARIABLE = "DSTACK_MAX_COST"
GUARD_VARIABLE = "DSTACK_MAX_COST_SECONDS"
# The reason of an outcome whose run was stopped at its limit; servers send none of that name.
MAX_COST_REASON = "max_cost_exceeded"


@dataclass(frozen=True, slots=True)
class CostLimit:
    """What a run may cost.

    Attributes:
        max_cost: The most that it may cost, in USD.
        guard: The ``max_duration`` in seconds that the limit gave the run; None if it has its own or none.
    """

    max_cost: float
    guard: int | None = None

    @property
    def env(self) -> dict[str, str]:
        """The variables that hold it."""
        guard = {} if self.guard is None else {GUARD_VARIABLE: str(self.guard)}
        return {MAX_COST_VARIABLE: f"{self.max_cost:.12g}", **guard}

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> CostLimit | None:
        """Return the limit that ``env`` holds, None without one, or with one that cannot be read."""
        try:
            max_cost = float(env[MAX_COST_VARIABLE])
        except (KeyError, ValueError):
            return None
        guard = env.get(GUARD_VARIABLE, "")
        return cls(max_cost, int(guard) if guard.isdecimal() else None) if 0 < max_cost < math.inf else None

    def reached(self, cost: float) -> str:
        """Return the message of a run that was stopped at its limit."""
        return (
            f"was stopped at its cost limit (it cost {format_usd(cost)}, and max_cost is "
            f"{format_usd(self.max_cost)})"
        )

    def guarded(self, cost: float) -> str:
        """Return the message of a run that the server ended because of its limit."""
        return (
            f"was stopped at its cost limit (its max_duration of {format_duration(self.guard or 0)}, for "
            f"which {format_usd(self.max_cost)} last at the highest price on offer; it cost "
            f"{format_usd(cost)})"
        )


def refuse_update(max_cost: object) -> None:
    """Raise ``ConfigurationError`` for a limit of a run that may be updated in place."""
    if max_cost is not None:
        raise ConfigurationError(
            f"max_cost: expected a run that is submitted, got one that may be updated in place "
            f"(max_cost={max_cost!r}). Submit it with submit(), or leave max_cost out."
        )


def check_max_cost(value: Any, field: str = "max_cost") -> float:
    """Return a cost in USD, also one written as text; raises ``ConfigurationError`` that names ``field``."""
    try:
        cost = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        cost = math.nan
    if not 0 < cost < math.inf:
        raise ConfigurationError(f"{field}: expected USD above 0, got {value!r}.")
    return cost
