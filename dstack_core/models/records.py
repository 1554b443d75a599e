"""What the server keeps of a run beside its logs: events and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Hold one event the server recorded, such as a change of status.

    ``id`` (a UUID), ``message`` (str, for a person), ``recorded_at`` (aware), ``actor`` (the name of the
    user who caused it, None for the server itself), ``targets`` (mappings as the server writes them:
    ``type``, ``id``, ``name``, ...). Source: PROTOCOL 1.9.
    """

    id: str
    message: str
    recorded_at: datetime
    actor: str | None
    targets: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """Hold one measured series of a job, oldest value first.

    ``name`` is the server's: ``cpu_usage_percent`` (100 for each CPU in full use), ``memory_usage_bytes``,
    ``memory_working_set_bytes``, ``memory_total_bytes``, ``cpus_detected_num``, ``gpus_detected_num``,
    ``gpu_memory_total_bytes``, and for each GPU ``gpu_memory_usage_bytes_gpu0`` (bytes) and
    ``gpu_util_percent_gpu0`` (percent). ``timestamps`` (aware) and ``values`` go together. Source:
    PROTOCOL 1.9.
    """

    name: str
    timestamps: tuple[datetime, ...]
    values: tuple[float, ...]
