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

    ``max_price_per_hour`` (USD) is the highest price among all offers, None without any. ``advice`` (str) is
    what may bring offers where there are none, ``gpu: 16GB is an exact size; write 16GB.. for at least``;
    else None. Source: PROTOCOL 1.4.
    """

    offers: tuple[Offer, ...]
    total_offers: int
    max_price_per_hour: float | None
    advice: str | None = None
