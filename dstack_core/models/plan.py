"""What a run would cost, and where it could run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offer:
    """One machine that a run could have.

    Attributes:
        backend: The backend it comes from.
        region: The backend's region.
        instance: The type of machine.
        price_per_hour: Its price, in USD per hour.
        spot: Whether it is a spot instance, which can be taken away.
        availability: The server's own word, or None.
        gpu: The name of its GPUs, None if it has none.
        gpus: The number of its GPUs.
        gpu_memory: The memory of one GPU in bytes, None if it has none.
    """

    backend: str
    region: str
    instance: str
    price_per_hour: float
    spot: bool
    availability: str | None
    gpu: str | None = None
    gpus: int = 0
    gpu_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What would happen on a submission.

    Attributes:
        offers: Machines that the run could have, the cheapest first.
        total_offers: How many offers there are in all.
        max_price_per_hour: The highest price of all offers in USD per hour, None without any.
        hints: Sentences on what may prevent machines from being offered; empty if one is on offer.
        waits_for_capacity: Whether its retry policy lets the run wait if no machine is on offer.

    Source: PROTOCOL 1.4.
    """

    offers: tuple[Offer, ...]
    total_offers: int
    max_price_per_hour: float | None
    hints: tuple[str, ...] = ()
    waits_for_capacity: bool = False
