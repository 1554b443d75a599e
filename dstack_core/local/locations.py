"""The places that offer the simulated machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Location:
    """A place that offers the machine: USD per hour."""

    backend: str
    region: str
    price: float


def read_regions(regions: Mapping[str, float] | None) -> tuple[Location, ...]:
    """Return the places of a mapping of ``"BACKEND/REGION"`` to a price; raises ValueError."""
    found = []
    for name, price in (regions or {}).items():
        backend, slash, region = name.partition("/")
        if not (backend and slash and region):
            raise ValueError(f'regions: expected "BACKEND/REGION" such as "aws/us-east-1", got {name!r}.')
        if isinstance(price, bool) or not isinstance(price, int | float) or price < 0:
            raise ValueError(f"regions: expected a price of 0 or more for {name}, got {price!r}.")
        found.append(Location(backend, region, float(price)))
    return tuple(found)


class Places:
    """Where a server offers its machine now: in its own places, or in those of a scenario."""

    def __init__(self, own: tuple[Location, ...] = ()) -> None:
        self._own = own
        self.now = own

    def replace(self, regions: Mapping[str, float]) -> None:
        """Offer the machine in other places from now on; raises ValueError."""
        self.now = read_regions(regions)

    def restore(self) -> None:
        """Offer it in the server's own places again."""
        self.now = self._own
