"""What a run would cost, and where it could run."""

from __future__ import annotations

from collections.abc import Iterator
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
        fleets: How many fleets the project has; None if a machine is on offer, or if the server's runs need
            no fleet (before 0.20). With 0 the run fails with ``NoFleetError``.

    Source: PROTOCOL 1.4.
    """

    offers: tuple[Offer, ...]
    total_offers: int
    max_price_per_hour: float | None
    hints: tuple[str, ...] = ()
    waits_for_capacity: bool = False
    fleets: int | None = None


@dataclass(frozen=True, slots=True)
class GpuOffers:
    """The offers with one kind of GPU.

    Attributes:
        gpu: The name of the GPU, None for machines without one.
        gpu_memory: The memory of one GPU in bytes, None for machines without one.
        counts: The numbers of GPUs that a machine has, ascending (tuple of int).
        backends: The backends that have it (tuple of str).
        regions: The regions that have it (tuple of str).
        min_price_per_hour, max_price_per_hour: The lowest and highest price of a machine, in USD per hour.
        offers: The offers, the cheapest first.
    """

    gpu: str | None
    gpu_memory: int | None
    counts: tuple[int, ...]
    backends: tuple[str, ...]
    regions: tuple[str, ...]
    min_price_per_hour: float
    max_price_per_hour: float
    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class Offers:
    """The machines that the project could get.

    Attributes:
        offers: The machines, the cheapest first; at most as many as were asked for.
        total: How many offers there are in all.

    Source: PROTOCOL 1.4.
    """

    offers: tuple[Offer, ...]
    total: int

    def __iter__(self) -> Iterator[Offer]:
        return iter(self.offers)

    def __len__(self) -> int:
        return len(self.offers)

    def by_gpu(self) -> tuple[GpuOffers, ...]:
        """Return the offers grouped by GPU and its memory, the group with the cheapest machine first."""
        groups: dict[tuple[str | None, int | None], list[Offer]] = {}
        for offer in sorted(self.offers, key=lambda each: each.price_per_hour):
            groups.setdefault((offer.gpu, offer.gpu_memory), []).append(offer)
        return tuple(
            GpuOffers(
                gpu=gpu,
                gpu_memory=memory,
                counts=tuple(sorted({each.gpus for each in group})),
                backends=tuple(sorted({each.backend for each in group})),
                regions=tuple(sorted({each.region for each in group})),
                min_price_per_hour=group[0].price_per_hour,
                max_price_per_hour=group[-1].price_per_hour,
                offers=tuple(group),
            )
            for (gpu, memory), group in groups.items()
        )
