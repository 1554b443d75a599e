"""What a run would cost and where it could go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offer:
    """Hold one machine a run could have; ``price_per_hour`` in USD, ``availability`` as the server says."""

    backend: str
    region: str
    instance: str
    price_per_hour: float
    spot: bool
    availability: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold what would happen on submit: the cheapest offers first, and how many there are in all.

    ``max_price_per_hour`` (USD) is the highest price among all offers, None without any. ``hints`` are
    sentences on what may keep machines away; there are none where a machine is on offer. Source:
    PROTOCOL 1.4.
    """

    offers: tuple[Offer, ...]
    total_offers: int
    max_price_per_hour: float | None
    hints: tuple[str, ...] = ()
