"""The simulated machine: what it offers, where and at which price, and whether a job fits on it.

Jobs do not use up capacity: each sees the whole machine, however many run. CPU, memory, disk and GPUs are cut
to what a job requests, because a cloud has machines of many sizes. The memory of a GPU cannot be cut:
``gpu: 16GB`` means exactly 16 GB, as on every server, and an A100 of 80 GB does not match it.

Without places of its own (`Inventory.offered`) there is one place, and `backends` and `regions` of a run do
not restrict it: a configuration that is meant for a cloud runs unchanged. With them, they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dstack_core.local.locations import Location, Places
from dstack_core.local.quantities import GPUSpec, IntRange, MemoryRange, ResourcesSpec

# dstack's name for the machines of SSH fleets, which come from no cloud. Its client rejects unknown names.
BACKEND = "remote"
REGION = "local"


def no_offers(fleet: str) -> str:
    """Return why a job found no machine in a fleet, as a real server writes it."""
    return (
        f"No offers matching the run requirements in fleet {fleet!r}.\n"
        "See https://dstack.ai/docs/guides/troubleshooting/#provisioning-fails"
    )


@dataclass(frozen=True, slots=True)
class Where:
    """What a run or fleet accepts: backends and regions (None: any), USD per hour at most."""

    backends: Sequence[str] | None = None
    regions: Sequence[str] | None = None
    max_price: float | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The simulated machine: sizes in GB, price in USD per hour."""

    gpus: int = 8
    gpu_name: str = "A100"
    gpu_memory: float = 80.0
    cpus: int = 64
    memory: float = 512.0
    disk: float = 10240.0
    price: float = 1.2
    offered: Places = field(default_factory=Places)

    @property
    def locations(self) -> tuple[Location, ...]:
        """Return the places that offer it now; none: one place, which nothing restricts."""
        return self.offered.now

    def places(self, *wanted: Where) -> list[Location]:
        """Return the places of the machine that meet all these wishes, the cheapest first."""
        # Read once: a test may replace them meanwhile.
        own = self.locations
        found = own or (Location(BACKEND, REGION, self.price),)
        return sorted(
            (one for one in found if all(_is_wanted(one, each, bool(own)) for each in wanted)),
            key=lambda one: one.price,
        )

    def fits(self, resources: ResourcesSpec) -> bool:
        """Return whether the machine, or a piece of it, meets the requirements."""
        if resources.cpu.arch == "arm" or (resources.cpu.count.min or 0) > self.cpus:
            return False
        if (resources.memory.min or 0) > self.memory:
            return False
        if resources.disk is not None and (resources.disk.size.min or 0) > self.disk:
            return False
        return self._fits_gpu(resources)

    def _fits_gpu(self, resources: ResourcesSpec) -> bool:
        gpu = resources.gpu
        if gpu is None or not (gpu.count.min or _is_requested(gpu)):
            return True
        if gpu.vendor not in (None, "nvidia") or (gpu.count.min or 0) > self.gpus:
            return False
        if gpu.name and self.gpu_name.upper() not in [name.upper() for name in gpu.name]:
            return False
        if not _holds(gpu.memory, self.gpu_memory):
            return False
        return self._gpu_count(gpu) is not None

    def _gpu_count(self, gpu: GPUSpec) -> int | None:
        """Return the smallest number of GPUs that meets the requirements, or None."""
        most = self.gpus if gpu.count.max is None else min(gpu.count.max, self.gpus)
        least = gpu.count.min or (1 if _is_requested(gpu) else 0)
        for count in range(least, most + 1):
            if _holds(gpu.total_memory, self.gpu_memory * count):
                return count
        return None

    def wanted_gpus(self, resources: ResourcesSpec) -> int:
        """Return the number of GPUs that a job gets."""
        return (self._gpu_count(resources.gpu) or 0) if resources.gpu is not None else 0

    def _gpu(self) -> dict[str, Any]:
        return {"name": self.gpu_name, "memory_mib": int(self.gpu_memory * 1024), "vendor": "nvidia"}

    def instance(self, resources: ResourcesSpec, is_spot: bool = False) -> dict[str, Any]:
        """Return the piece of the machine that a job gets, as JSON data."""
        disk = resources.disk.size if resources.disk is not None else MemoryRange(min=100)
        return {
            "name": "local",
            "resources": {
                "cpus": _piece(resources.cpu.count, 1),
                "memory_mib": int(_piece(resources.memory, 1) * 1024),
                "gpus": [self._gpu() for _ in range(self.wanted_gpus(resources))],
                "spot": is_spot,
                "disk": {"size_mib": int(_piece(disk, 1) * 1024)},
                "cpu_arch": "x86",
                "description": "",
            },
        }

    def whole(self, name: str) -> dict[str, Any]:
        """Return the whole machine as JSON data."""
        return {
            "name": name,
            "resources": {
                "cpus": self.cpus,
                "memory_mib": int(self.memory * 1024),
                "gpus": [self._gpu() for _ in range(self.gpus)],
                "spot": False,
                "disk": {"size_mib": int(self.disk * 1024)},
                "cpu_arch": "x86",
                "description": "",
            },
        }

    def offers(self, resources: ResourcesSpec, *wanted: Where, is_spot: bool = False) -> list[dict[str, Any]]:
        """Return the offers for a job, cheapest first, as JSON data; none if it does not fit."""
        if not self.fits(resources):
            return []
        return [offer(place, self.instance(resources, is_spot)) for place in self.places(*wanted)]


def _is_wanted(place: Location, wanted: Where, is_restricted: bool) -> bool:
    if wanted.max_price is not None and wanted.max_price < place.price:
        return False
    if not is_restricted:
        return True
    if wanted.backends is not None and place.backend not in wanted.backends:
        return False
    regions = None if wanted.regions is None else {region.lower() for region in wanted.regions}
    return regions is None or place.region.lower() in regions


def offer(place: Location, instance: dict[str, Any], availability: str = "available") -> dict[str, Any]:
    """Return an offer of a machine, as JSON data."""
    return {
        "backend": place.backend,
        "instance": instance,
        "region": place.region,
        "price": place.price,
        "backend_data": {},
        "availability": availability,
        "availability_zones": None,
        "instance_runtime": "shim",
        "blocks": 1,
        "total_blocks": 1,
    }


def suits(instance: dict[str, Any], resources: ResourcesSpec) -> bool:
    """Return whether a machine that exists, as JSON data, meets the requirements."""
    has = instance["resources"]
    gpus, gpu = has["gpus"], resources.gpu
    if resources.cpu.arch == "arm" or not _holds(resources.cpu.count, has["cpus"]):
        return False
    if not _holds(resources.memory, has["memory_mib"] / 1024):
        return False
    if resources.disk is not None and not _holds(resources.disk.size, has["disk"]["size_mib"] / 1024):
        return False
    if gpu is None or not (gpus or gpu.count.min or _is_requested(gpu)):
        return True
    if not gpus or gpu.vendor not in (None, gpus[0]["vendor"]) or not _holds(gpu.count, len(gpus)):
        return False
    if gpu.name and gpus[0]["name"].upper() not in [name.upper() for name in gpu.name]:
        return False
    memory = gpus[0]["memory_mib"] / 1024
    return _holds(gpu.memory, memory) and _holds(gpu.total_memory, memory * len(gpus))


def _is_requested(gpu: GPUSpec) -> bool:
    """Return whether some kind of GPU is requested, although a count of 0 would be allowed."""
    return any((gpu.name, gpu.memory, gpu.total_memory, gpu.compute_capability)) and gpu.count.max != 0


def _holds(wanted: MemoryRange | IntRange | None, size: float) -> bool:
    if wanted is None:
        return True
    return (wanted.min or 0) <= size and (wanted.max is None or size <= wanted.max)


def _piece(wanted: IntRange | MemoryRange, default: int) -> Any:
    """Return the smallest amount in a range."""
    if wanted.min is not None:
        return wanted.min
    return default if wanted.max is None else min(default, wanted.max)
