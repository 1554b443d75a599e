"""Log pages, the cursor's arithmetic, and lines out of chunks (PROTOCOL 1.8)."""

from __future__ import annotations

import base64
from binascii import a2b_base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from dstack_core._wire.http_messages import text, time_of
from dstack_core.models.progress import LogCursor

PAGE_SIZE = 1000
_LONGEST_PENDING = 64 * 1024
_TODAYS = "0000-00-00T00:00:00.000000Z"
_NO_DIGITS = str.maketrans("123456789", "0" * 9)
_OFFSET = "+00:00"


@dataclass(frozen=True, slots=True)
class LogMessages:
    """Hold messages in columns: a busy log is thousands a second, too many for an object each.

    A message is a chunk as the runner read it, not a line. A timestamp is written in UTC at a fixed width,
    so that comparing two as text compares the times, whichever way the server writes them (PROTOCOL 1.1:
    ``Z`` or ``+00:00``).
    """

    timestamps: list[str]
    chunks: list[bytes]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.timestamps)

    @property
    def data(self) -> bytes:
        """Return all their bytes."""
        return b"".join(self.chunks)

    def behind(self, number: int) -> LogMessages:
        """Return those behind the first ``number``."""
        return LogMessages(self.timestamps[number:], self.chunks[number:]) if number else self


@dataclass(frozen=True, slots=True)
class LogPage:
    """Hold one page; ``next_token`` asks for the next one.

    ``tokens`` tells whether this server has page tokens at all (0.19.16 on).
    """

    messages: LogMessages
    next_token: str | None
    tokens: bool


def parse_page(body: Mapping[str, Any]) -> LogPage:
    """Read the reply of ``logs/poll``."""
    logs = body["logs"]
    timestamps = _all_utc([item["timestamp"] for item in logs])
    messages = LogMessages(timestamps, [a2b_base64(item["message"]) for item in logs])
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


def _all_utc(timestamps: Sequence[str]) -> list[str]:
    # Today's servers write them so that only the offset is to be spelt out, for all of them at once.
    joined = "".join(timestamps)
    if timestamps and joined.translate(_NO_DIGITS) == _TODAYS * len(timestamps):
        # The newest is what the next request asks behind, the last what a chunk is dated with.
        for used in (max(timestamps), timestamps[-1]):
            datetime.fromisoformat(used)
        return joined.replace("Z", _OFFSET + "\n").split("\n")[:-1]
    return [_utc(timestamp) for timestamp in timestamps]


def _utc(timestamp: str) -> str:
    return time_of(timestamp).isoformat(timespec="microseconds")


class Reader:
    """Pass over what the cursor has seen and move it on, across the pages of one read."""

    def __init__(self, cursor: LogCursor) -> None:
        self.cursor = cursor
        self._to_pass = cursor.seen_at_after
        self._passing_at = cursor.after

    def take(self, messages: LogMessages) -> LogMessages:
        """Return the messages not seen before and count them as seen."""
        passed = 0
        while self._to_pass and passed < len(messages) and messages.timestamps[passed] == self._passing_at:
            self._to_pass -= 1
            passed += 1
        fresh = messages.behind(passed)
        if fresh:
            self._to_pass = 0
            self._count(fresh.timestamps)
        return fresh

    def _count(self, fresh: Sequence[str]) -> None:
        newest, cursor = max(fresh), self.cursor
        if cursor.after is None or newest > cursor.after:
            self.cursor = replace(cursor, after=newest, seen_at_after=fresh.count(newest))
        elif newest == cursor.after:
            self.cursor = replace(cursor, seen_at_after=cursor.seen_at_after + fresh.count(newest))


def split_lines(cursor: LogCursor, data: bytes, *, final: bool = False) -> tuple[tuple[str, ...], LogCursor]:
    """Return the whole lines that ``data`` completes, and the cursor that keeps the rest.

    ``final`` also gives out a last line without an end. A line longer than 64 KiB is given out in
    pieces, so that output without line ends costs no unbounded memory. Bytes that are no UTF-8 become
    replacement characters.
    """
    whole = base64.b64decode(cursor.pending) + data
    end = whole.rfind(b"\n") + 1
    lines, rest = _texts(whole[:end]), whole[end:]
    rest = _last_state(rest)
    while len(rest) > _LONGEST_PENDING:
        cut = _character_border(rest, _LONGEST_PENDING)
        lines.append(_text(rest[:cut]))
        rest = rest[cut:]
    if final and rest:
        lines.append(_text(rest))
        rest = b""
    return tuple(lines), replace(cursor, pending=base64.b64encode(rest).decode())


def _texts(block: bytes) -> list[str]:
    """Return the lines of ``block``; its last one has an end as well."""
    returns, ends = block.count(b"\r"), block.count(b"\n")
    lines = block.decode(errors="replace").split("\r\n" if returns else "\n")[:-1]
    if len(lines) == ends and returns in (0, ends):
        return lines
    return [_text(line) for line in block.split(b"\n")[:-1]]


def _text(line: bytes) -> str:
    return _last_state(line.rstrip(b"\r")).decode(errors="replace")


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
