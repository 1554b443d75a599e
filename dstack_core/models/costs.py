"""What runs have cost, in groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a group of runs has cost.

    Attributes:
        group: The group's name; of several keys ``"train / fit"``. ``"-"`` stands for runs that lack the key.
        runs: The number of runs.
        cost: USD, the exact sum of the server's numbers, which have four decimals.
        keys: The group by key, such as ``{"dag": "train", "task": "fit"}``.
    """

    group: str
    runs: int
    cost: Decimal
    keys: Mapping[str, str] = field(default_factory=dict)
