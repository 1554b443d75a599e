"""Read what a job has of its machine, or an offer of its own (PROTOCOL 1.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_core._wire.http_messages import text
from dstack_core.models.utilization import Hardware

_MIB = 2**20


def read_hardware(data: Any) -> Hardware:
    """Read ``resources`` of an instance; what is missing or malformed is unknown."""
    if not isinstance(data, Mapping):
        return Hardware()
    gpus = [each for each in data.get("gpus") or [] if isinstance(each, Mapping)]
    first: Mapping[str, Any] = gpus[0] if gpus else {}
    return Hardware(
        cpus=_number(data.get("cpus")),
        memory=_bytes(data.get("memory_mib")),
        gpus=len(gpus),
        gpu=text(first.get("name")) or None,
        gpu_memory=_bytes(first.get("memory_mib")),
        gpu_vendor=text(first.get("vendor")) or None,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _bytes(value: Any) -> int | None:
    mib = _number(value)
    return None if mib is None else round(mib * _MIB)
