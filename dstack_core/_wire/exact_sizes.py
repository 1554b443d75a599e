"""Say which sizes of a run's resources are exact: the usual reason why no machine has them.

In a ``.dstack.yml`` ``gpu: 16GB`` asks for GPUs of exactly 16 GB, and ``memory: 32GB`` for exactly 32 GB.
Read from the server's echo, where every size is a range, so that it holds for each way to write it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def advice_on_exact_sizes(job_spec: Mapping[str, Any]) -> str | None:
    """Return what to write instead of the exact sizes of a job, as a sentence; None when there are none."""
    resources = (job_spec.get("requirements") or {}).get("resources")
    if not isinstance(resources, Mapping):
        return None
    told = [
        f"{name}: {size} is an exact size; write {size}.. for at least" for name, size in _sizes(resources)
    ]
    return "; ".join(told) or None


def _sizes(resources: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    gpu = resources.get("gpu")
    disk = resources.get("disk")
    ranges = {
        "gpu": gpu.get("memory") if isinstance(gpu, Mapping) else None,
        "total_memory of gpu": gpu.get("total_memory") if isinstance(gpu, Mapping) else None,
        "memory": resources.get("memory"),
        "disk": disk.get("size") if isinstance(disk, Mapping) else None,
    }
    for name, limits in ranges.items():
        size = limits.get("min") if isinstance(limits, Mapping) else None
        if isinstance(size, int | float) and isinstance(limits, Mapping) and size == limits.get("max"):
            yield name, f"{size:g}GB" if size >= 1 else f"{size * 1024:g}MB"
