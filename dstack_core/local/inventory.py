"""What the pretended machine offers, and whether a job fits on it.

There is no capacity to use up: every job sees the whole machine, however many run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstack_core.local.quantities import ResourcesSpec

NO_OFFERS = (
    "No offers matching the run requirements in fleet 'local'.\n"
    "See https://dstack.ai/docs/guides/troubleshooting/#provisioning-fails"
)


@dataclass(frozen=True, slots=True)
class Inventory:
    """Describe the pretended machine: sizes in GB, price in USD per hour."""

    gpus: int = 8
    gpu_name: str = "A100"
    gpu_memory: float = 80.0
    cpus: int = 64
    memory: float = 512.0
    disk: float = 10240.0
    price: float = 1.2

    def fits(self, resources: ResourcesSpec, max_price: float | None) -> bool:
        """Tell whether the machine meets the requirements.

        Only lower bounds are compared: the machine could always be cut into smaller pieces. A named GPU must
        be the one of the machine.
        """
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
        count = wanted_gpus(resources)
        if gpu is None or count == 0:
            return True
        if count > self.gpus or gpu.vendor not in (None, "nvidia"):
            return False
        if gpu.name is not None and self.gpu_name.upper() not in [name.upper() for name in gpu.name]:
            return False
        least = gpu.memory.min if gpu.memory is not None else None
        total = gpu.total_memory.min if gpu.total_memory is not None else None
        return (least or 0) <= self.gpu_memory and (total or 0) <= self.gpu_memory * count

    def instance(self, resources: ResourcesSpec) -> dict[str, Any]:
        """Return the piece of the machine that a job gets, as JSON data."""
        disk = resources.disk.size.min if resources.disk is not None else None
        gpu = {"name": self.gpu_name, "memory_mib": int(self.gpu_memory * 1024), "vendor": "nvidia"}
        return {
            "name": "local",
            "resources": {
                "cpus": resources.cpu.count.min or 1,
                "memory_mib": int((resources.memory.min or 1) * 1024),
                "gpus": [dict(gpu) for _ in range(wanted_gpus(resources))],
                "spot": False,
                "disk": {"size_mib": int((disk or 100) * 1024)},
                "cpu_arch": "x86",
                "description": "",
            },
        }

    def offer(self, resources: ResourcesSpec) -> dict[str, Any]:
        """Return the offer for a job, as JSON data."""
        return {
            "backend": "local",
            "instance": self.instance(resources),
            "region": "local",
            "price": self.price,
            "backend_data": {},
            "availability": "available",
            "availability_zones": None,
            "instance_runtime": "shim",
            "blocks": 1,
            "total_blocks": 1,
        }


def wanted_gpus(resources: ResourcesSpec) -> int:
    """Return the least number of GPUs a job asks for."""
    return (resources.gpu.count.min or 0) if resources.gpu is not None else 0
