"""What the server keeps of a run beside its logs: events and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self


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


class LogBytes(bytes):
    """Hold bytes of a run's log: a ``bytes`` in every respect, so ``sys.stdout.buffer.write(log)`` works.

    ``node`` and ``replica`` (int) say which job wrote them, ``attempt`` (int) grows when the server retries
    the job, ``submission_id`` is the server's key of that log, ``timestamp`` (aware, or None) is when the
    last of them were read.
    """

    node: int
    replica: int
    attempt: int
    submission_id: str
    timestamp: datetime | None

    def __new__(
        cls,
        data: bytes = b"",
        *,
        node: int = 0,
        replica: int = 0,
        attempt: int = 0,
        submission_id: str = "",
        timestamp: datetime | None = None,
    ) -> Self:
        """Return ``data`` with what is known of it."""
        log = super().__new__(cls, data)
        log.node = node
        log.replica = replica
        log.attempt = attempt
        log.submission_id = submission_id
        log.timestamp = timestamp
        return log
