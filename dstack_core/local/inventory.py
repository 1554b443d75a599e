"""The simulated machine: what it offers, and whether a job fits on it.

Jobs do not use up capacity: each sees the whole machine, however many run. CPU, memory, disk and GPUs are cut
to what a job requests, because a cloud has machines of many sizes. The memory of a GPU cannot be cut:
``gpu: 16GB`` means exactly 16 GB, as on every server, and an A100 of 80 GB does not match it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstack_core.local.quantities import GPUSpec, IntRange, MemoryRange, ResourcesSpec

# dstack's name for the machines of SSH fleets, which come from no cloud. Its client rejects unknown names.
BACKEND = "remote"
# As a real server writes it.
NO_OFFERS = (
    "No offers matching the run requirements in fleet 'local'.\n"
    "See https://dstack.ai/docs/guides/troubleshooting/#provisioning-fails"
)


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

    def fits(self, resources: ResourcesSpec, max_price: float | None) -> bool:
        """Return whether the machine, or a piece of it, meets the requirements."""
        if max_price is not None and max_price < self.price:
            return False
        if resources.cpu.arch == "arm" or (resources.cpu.count.min or 0) > self.cpus:
            return False
        if (resources.memory.min or 0) > self.memory:
            return False
        if resources.disk is not None and (resources.disk.size.min or 0) > self.disk:
            return False
        return self._fits_gpu(resources)

    def _fits_gpu(self, resources: ResourcesSpec) -> bool:
        gpu = resources.gpu
        if gpu is None or not (gpu.count.min or _is_wanted(gpu)):
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
        least = gpu.count.min or (1 if _is_wanted(gpu) else 0)
        for count in range(least, most + 1):
            if _holds(gpu.total_memory, self.gpu_memory * count):
                return count
        return None

    def wanted_gpus(self, resources: ResourcesSpec) -> int:
        """Return the number of GPUs that a job gets."""
        return (self._gpu_count(resources.gpu) or 0) if resources.gpu is not None else 0

    def instance(self, resources: ResourcesSpec, is_spot: bool = False) -> dict[str, Any]:
        """Return the piece of the machine that a job gets, as JSON data."""
        disk = resources.disk.size if resources.disk is not None else MemoryRange(min=100)
        gpu = {"name": self.gpu_name, "memory_mib": int(self.gpu_memory * 1024), "vendor": "nvidia"}
        return {
            "name": "local",
            "resources": {
                "cpus": _piece(resources.cpu.count, 1),
                "memory_mib": int(_piece(resources.memory, 1) * 1024),
                "gpus": [dict(gpu) for _ in range(self.wanted_gpus(resources))],
                "spot": is_spot,
                "disk": {"size_mib": int(_piece(disk, 1) * 1024)},
                "cpu_arch": "x86",
                "description": "",
            },
        }

    def offer(self, resources: ResourcesSpec, is_spot: bool = False) -> dict[str, Any]:
        """Return the offer for a job, as JSON data."""
        return {
            "backend": BACKEND,
            "instance": self.instance(resources, is_spot),
            "region": "local",
            "price": self.price,
            "backend_data": {},
            "availability": "available",
            "availability_zones": None,
            "instance_runtime": "shim",
            "blocks": 1,
            "total_blocks": 1,
        }


def _is_wanted(gpu: GPUSpec) -> bool:
    """Return whether some kind of GPU is requested, although a count of 0 would be allowed."""
    return any((gpu.name, gpu.memory, gpu.total_memory, gpu.compute_capability)) and gpu.count.max != 0


def _holds(wanted: MemoryRange | None, size: float) -> bool:
    if wanted is None:
        return True
    return (wanted.min or 0) <= size and (wanted.max is None or size <= wanted.max)


def _piece(wanted: IntRange | MemoryRange, default: int) -> Any:
    """Return the smallest amount in a range."""
    if wanted.min is not None:
        return wanted.min
    return default if wanted.max is None else min(default, wanted.max)
