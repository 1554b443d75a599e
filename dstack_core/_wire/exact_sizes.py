"""Find sizes that a server reads as exact: ``gpu: 16GB`` asks for a GPU of 16 GB, not of at least that.

Such a size is a common cause of "no capacity". The server's plan and jobs have each size as a range, so an
exact one is a range whose ends are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact_sizes(job_spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return an advice for each exact size of a job (PROTOCOL 2.4); often a minimum is meant."""
    resources = (job_spec.get("requirements") or {}).get("resources") or {}
    gpu, disk = resources.get("gpu") or {}, resources.get("disk") or {}
    sizes = {
        "memory": resources.get("memory"),
        "disk": disk.get("size"),
        "gpu memory": gpu.get("memory"),
        "gpu total memory": gpu.get("total_memory"),
    }
    return tuple(
        f"{name}: {size['min']:g}GB is an exact size; write {size['min']:g}GB.. for at least that."
        for name, size in sizes.items()
        if isinstance(size, Mapping)
        and isinstance(size.get("min"), int | float)
        and size["min"] == size.get("max")
    )
