"""Log pages, the cursor's arithmetic, and lines out of chunks (PROTOCOL 1.8)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from dstack_core._wire.plain import text, time_of
from dstack_core.models.progress import LogCursor

PAGE_SIZE = 1000
_LONGEST_PENDING = 64 * 1024


@dataclass(frozen=True, slots=True)
class LogMessage:
    """Hold one message: a chunk as the runner read it, not a line.

    ``timestamp`` is written in UTC at a fixed width, so that comparing two as text compares the times,
    whichever way the server writes them (PROTOCOL 1.1: ``Z`` or ``+00:00``).
    """

    timestamp: str
    data: bytes


@dataclass(frozen=True, slots=True)
class LogPage:
    """Hold one page; ``next_token`` asks for the next one.

    ``tokens`` tells whether this server has page tokens at all (0.19.16 on).
    """

    messages: Sequence[LogMessage]
    next_token: str | None
    tokens: bool


def parse_page(body: Mapping[str, Any]) -> LogPage:
    """Read the reply of ``logs/poll``."""
    messages = [
        LogMessage(_utc(item["timestamp"]), base64.b64decode(item["message"])) for item in body["logs"]
    ]
    return LogPage(messages, text(body.get("next_token")), tokens="next_token" in body)


def start_time(cursor: LogCursor) -> str | None:
    """Return the exclusive ``start_time`` that shows the messages at ``after`` again.

    Others of the same timestamp may be stored later; the ones already seen are counted and passed over.
    """
    if cursor.after is None:
        return None
    return (datetime.fromisoformat(cursor.after) - timedelta(microseconds=1)).isoformat(
        timespec="microseconds"
    )


def _utc(timestamp: str) -> str:
    return time_of(timestamp).isoformat(timespec="microseconds")


class Reader:
    """Pass over what the cursor has seen and move it on, across the pages of one read."""

    def __init__(self, cursor: LogCursor) -> None:
        self.cursor = cursor
        self._to_pass = cursor.seen_at_after
        self._passing_at = cursor.after

    def take(self, messages: Sequence[LogMessage]) -> list[LogMessage]:
        """Return the messages not seen before and count them as seen."""
        fresh = [message for message in messages if not self._seen(message)]
        cursor = self.cursor
        for message in fresh:
            if message.timestamp == cursor.after:
                cursor = replace(cursor, seen_at_after=cursor.seen_at_after + 1)
            elif cursor.after is None or message.timestamp > cursor.after:
                cursor = replace(cursor, after=message.timestamp, seen_at_after=1)
        self.cursor = cursor
        return fresh

    def _seen(self, message: LogMessage) -> bool:
        if self._to_pass and message.timestamp == self._passing_at:
            self._to_pass -= 1
            return True
        self._to_pass = 0
        return False


def split_lines(cursor: LogCursor, data: bytes, *, final: bool = False) -> tuple[tuple[str, ...], LogCursor]:
    """Return the whole lines that ``data`` completes, and the cursor that keeps the rest.

    ``final`` also gives out a last line without an end. A line longer than 64 KiB is given out in
    pieces, so that output without line ends costs no unbounded memory. Bytes that are no UTF-8 become
    replacement characters.
    """
    pending = base64.b64decode(cursor.pending) + data
    *whole, rest = pending.split(b"\n")
    rest = _last_state(rest)
    while len(rest) > _LONGEST_PENDING:
        cut = _character_border(rest, _LONGEST_PENDING)
        whole.append(rest[:cut])
        rest = rest[cut:]
    if final and rest:
        whole.append(rest)
        rest = b""
    lines = tuple(_last_state(line.rstrip(b"\r")).decode(errors="replace") for line in whole)
    return lines, replace(cursor, pending=base64.b64encode(rest).decode())


def _last_state(line: bytes) -> bytes:
    """Keep what a terminal would show of a line that carriage returns rewrote."""
    if b"\r" not in line:
        return line
    ended = line.rstrip(b"\r")
    return ended.rpartition(b"\r")[2] + line[len(ended) :]


def _character_border(data: bytes, limit: int) -> int:
    """Return the last place up to ``limit`` that cuts no UTF-8 character in two."""
    for cut in range(limit, limit - 4, -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return limit
