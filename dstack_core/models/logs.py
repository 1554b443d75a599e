"""Raw log bytes that know where they come from."""

from __future__ import annotations

from datetime import datetime
from typing import Self


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
