"""What the server keeps of a run: events, metrics, and the bytes of its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One event that the server recorded, such as a change of status.

    Attributes:
        id: The event's id (a UUID).
        message: What happened, for a person.
        recorded_at: When the server recorded it (aware).
        actor: The name of the user who caused it, None for the server itself.
        targets: What it is about: mappings as the server writes them (``type``, ``id``, ``name``, ...).

    Source: PROTOCOL 1.9.
    """

    id: str
    message: str
    recorded_at: datetime
    actor: str | None
    targets: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured series of a job, oldest value first.

    Attributes:
        name: The server's name: ``cpu_usage_percent`` (100 for each CPU in full use), ``memory_usage_bytes``,
            ``memory_working_set_bytes``, ``memory_total_bytes``, ``cpus_detected_num``,
            ``gpus_detected_num``, ``gpu_memory_total_bytes``, and for each GPU
            ``gpu_memory_usage_bytes_gpu0`` (bytes) and ``gpu_util_percent_gpu0`` (percent).
        timestamps: When each value was measured (aware).
        values: The values, one for each timestamp.
        node: The job's node, counted from 0.
        replica: The job's replica, counted from 0.

    Source: PROTOCOL 1.9.
    """

    name: str
    timestamps: tuple[datetime, ...]
    values: tuple[float, ...]
    node: int = 0
    replica: int = 0


class LogBytes(bytes):
    """Bytes of a run's log: a ``bytes`` in every respect, so ``sys.stdout.buffer.write(log)`` works.

    Attributes:
        node: The node of the job that wrote them, counted from 0.
        replica: Its replica, counted from 0.
        attempt: Counted from 0; grows when the server retries the job.
        submission_id: The server's key of this log.
        timestamp: When the last of them were read (aware), or None.
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
        """Return ``data`` with the attributes."""
        log = super().__new__(cls, data)
        log.node = node
        log.replica = replica
        log.attempt = attempt
        log.submission_id = submission_id
        log.timestamp = timestamp
        return log
