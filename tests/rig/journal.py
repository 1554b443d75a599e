"""The record of a job agent for the server: log messages and job states on one clock."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# One reply must stay well below what travels through an SSH tunnel within the server's request timeout (9 s).
_REPLY_BYTES = 2_000_000


@dataclass(frozen=True)
class _Entry:
    timestamp: int
    raw: bytes = b""
    message: bytes = b""
    state: dict[str, Any] | None = None


class Journal:
    """Log messages and states in the order they happened, at strictly increasing milliseconds.

    The server requests everything after a timestamp and remembers the last one, so an entry that shared a
    millisecond with another one could be lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._closed = False
        self._watchers: list[Callable[[], None]] = []

    def ahead(self) -> float:
        """Return by how many seconds the last timestamp is ahead of the clock."""
        with self._lock:
            return max(0.0, self._next_timestamp() / 1000 - time.time())

    def log(self, raw: bytes, message: bytes) -> None:
        """Add raw output, and the message for the server that was made of it and may be empty."""
        with self._lock:
            self._entries.append(_Entry(self._next_timestamp(), raw, message))
        self._tell()

    def state(self, state: str, *, final: bool = False, **details: str | int | None) -> None:
        """Add a job state; after a final one no entry follows."""
        with self._lock:
            if self._closed:
                return
            timestamp = self._next_timestamp()
            known = {key: value for key, value in details.items() if value is not None}
            self._entries.append(_Entry(timestamp, state={"state": state, "timestamp": timestamp, **known}))
            self._closed = final
        self._tell()

    @contextlib.contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Call the watcher, from any thread, after each new entry; it must not block."""
        with self._lock:
            self._watchers.append(watcher)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.remove(watcher)

    def output(self, position: int, not_before: int) -> tuple[int, list[bytes], bool]:
        """Return the next position, the raw output since a position, and whether no more will follow.

        Output older than `not_before` (milliseconds) is left out.
        """
        with self._lock:
            news = self._entries[position:]
            chunks = [entry.raw for entry in news if entry.raw and entry.timestamp >= not_before]
            return position + len(news), chunks, self._closed

    def pull(self, after: int) -> dict[str, Any]:
        """Return the reply to the server's request for entries newer than a timestamp (PROTOCOL 5.2)."""
        logs: list[dict[str, Any]] = []
        states: list[dict[str, Any]] = []
        size, last, more = 0, after, False
        with self._lock:
            for entry in self._entries:
                if entry.timestamp <= after:
                    continue
                if size > _REPLY_BYTES:
                    more = True
                    break
                last = entry.timestamp
                if entry.state is not None:
                    states.append(entry.state)
                elif entry.message:
                    size += len(entry.message)
                    encoded = base64.b64encode(entry.message).decode("ascii")
                    logs.append({"timestamp": entry.timestamp, "message": encoded})
            has_more = more or not self._closed
        return {
            "job_states": states,
            "job_logs": logs,
            "runner_logs": [],
            "last_updated": last,
            "no_connections_secs": 0,
            "has_more": has_more,
        }

    def _tell(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher()

    def _next_timestamp(self) -> int:
        now = int(time.time() * 1000)
        return max(now, self._entries[-1].timestamp + 1) if self._entries else now
