"""Log pages, the cursor's arithmetic, and lines from chunks (PROTOCOL 1.8).

The problem: the server returns messages newer than ``start_time``, several may share a timestamp, and one of
the same timestamp may be stored after a read. A message is a chunk as the runner read it: it may end inside a
line or inside a UTF-8 character.

The idea: a cursor is the newest timestamp read and how many messages of that timestamp were read. The next
read asks from a microsecond before it and passes over as many. Chunks are joined as bytes, split at line
ends, and only whole lines are decoded; the bytes behind the last line end ride on the cursor as ``pending``.

Invariants: each message is counted once, whatever the pages. A line is reported once, whole, unless it is
longer than 64 KiB. Decoding never fails: bytes that are not UTF-8 become replacement characters.

Measured (``docs/performance.md``): ``follow`` relays 740,000 lines/s at one line per message, and 1.9
million lines/s at 40 lines per message, as fast as reading the bare replies. Hence columns, one conversion
for all timestamps of a page, and one decoding for all lines of a block.
"""

from __future__ import annotations

import base64
import math
from binascii import a2b_base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Any

from dstack_core._wire.http_messages import text, time_of
from dstack_core._wire.reports import MARK, Accepts, Found, give_up, take
from dstack_core.models.progress import LogCursor
from dstack_core.models.reports import DEFAULT_MAX_BYTES

# The server's limit (PROTOCOL 1.8; its default is 100). Smaller pages cost more requests for a busy log.
PAGE_SIZE = 1000
# Output without line ends, such as a progress bar, waits up to this size and is then reported in pieces. The
# pending bytes ride on every event and checkpoint, so a higher limit makes those large; a low one cuts lines.
_LONGEST_PENDING = 64 * 1024
# The first page of a log has no page before it to measure from; it may hold the messages of so many seconds.
_FIRST_PAGE_SECONDS = 60
# The pattern of today's timestamps, with every digit replaced by 0.
_TODAYS = "0000-00-00T00:00:00.000000Z"
_NO_DIGITS = str.maketrans("123456789", "0" * 9)
_OFFSET = "+00:00"


@dataclass(frozen=True, slots=True)
class LogMessages:
    """Messages in columns: a busy log has thousands a second, too many for an object each.

    A message is a chunk as the runner read it, not a line. A timestamp is written in UTC at a fixed width,
    so that comparing two as text compares the times, whichever way the server writes them (PROTOCOL 1.1:
    ``Z`` or ``+00:00``).
    """

    timestamps: list[str]
    chunks: list[bytes]

    def __len__(self) -> int:
        """Return the number of messages."""
        return len(self.timestamps)

    @property
    def data(self) -> bytes:
        """Return the bytes of all messages."""
        return b"".join(self.chunks)

    def behind(self, number: int) -> LogMessages:
        """Return the messages behind the first ``number``."""
        return LogMessages(self.timestamps[number:], self.chunks[number:]) if number else self


@dataclass(frozen=True, slots=True)
class LogPage:
    """One page of a log; ``next_token`` asks for the next page.

    ``tokens`` is whether this server has page tokens at all (0.19.16 on).
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

    Others of the same timestamp may be stored later; those already read are counted and passed over.
    """
    if cursor.after is None:
        return None
    return (datetime.fromisoformat(cursor.after) - timedelta(microseconds=1)).isoformat(
        timespec="microseconds"
    )


def _all_utc(timestamps: Sequence[str]) -> list[str]:
    # Today's servers write timestamps in one form in which only the "Z" must be replaced, so one replacement
    # converts a whole page. Any other form is parsed one by one.
    joined = "".join(timestamps)
    if timestamps and joined.translate(_NO_DIGITS) == _TODAYS * len(timestamps):
        # The pattern also fits a month 13. Only two timestamps are used, so only these are checked: the
        # newest is where the next request begins, the last is the time of the chunk.
        for used in (max(timestamps), timestamps[-1]):
            datetime.fromisoformat(used)
        return joined.replace("Z", _OFFSET + "\n").split("\n")[:-1]
    return [_utc(timestamp) for timestamp in timestamps]


def _utc(timestamp: str) -> str:
    return time_of(timestamp).isoformat(timespec="microseconds")


def most_kept(per_second: int, since: str | None, until: str | None) -> int:
    """Return how many messages are kept of a page of the log between two timestamps.

    Their distance counts, and not the time of reading: the log of an hour may be read at once.
    """
    if since is None or until is None:
        return per_second * _FIRST_PAGE_SECONDS
    seconds = (datetime.fromisoformat(until) - datetime.fromisoformat(since)).total_seconds()
    return math.ceil(per_second * max(1.0, seconds))


class Reader:
    """A filter for messages that the cursor has seen, which moves it on across the pages of one read."""

    def __init__(self, cursor: LogCursor) -> None:
        self.cursor = cursor
        self._to_pass = cursor.seen_at_after
        self._passing_at = cursor.after

    def take(self, messages: LogMessages) -> LogMessages:
        """Return the messages not seen before and count them as seen."""
        passed = 0
        # The server sends them in order, so those already seen are the first of their timestamp.
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


def split_lines(
    cursor: LogCursor,
    data: bytes,
    *,
    final: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
    accepts: Accepts = lambda kind, payload: True,
) -> tuple[tuple[str, ...], list[Found], LogCursor]:
    """Return the whole lines that ``data`` completes, the messages in them, and the cursor behind both.

    ``final`` also returns a last line without an end. A line longer than 64 KiB is returned in pieces, so
    that output without line ends does not fill the memory. Bytes that are not UTF-8 become replacement
    characters. ``max_bytes`` is the most bytes of a message; one that
    ``accepts`` refuses is text.
    """
    whole = base64.b64decode(cursor.pending) + data
    if final and MARK in whole and not whole.endswith(b"\n"):
        whole += b"\n"
    end = whole.rfind(b"\n") + 1
    block, rest = whole[:end], whole[end:]
    found: list[Found] = []
    parts = cursor.parts
    if MARK in block:
        block, found, parts = take(block, parts, max_bytes, accepts)
    if final and parts:
        shown, broken = give_up(parts)
        block, found, parts = block + shown, [*found, *broken], {}
    lines = _texts(block)
    # A message is read once its line has ended; until then nothing may be taken from it.
    if MARK not in rest:
        rest = _last_state(rest)
    while len(rest) > _LONGEST_PENDING:
        cut = _character_border(rest, _LONGEST_PENDING)
        lines.append(_text(rest[:cut]))
        rest = rest[cut:]
    if final and rest:
        lines.append(_text(rest))
        rest = b""
    pending = base64.b64encode(rest).decode()
    is_shown = cursor.shown and pending == cursor.pending
    return tuple(lines), found, replace(cursor, pending=pending, parts=parts, reported=0, shown=is_shown)


def split_timed(
    cursor: LogCursor,
    messages: LogMessages | None,
    *,
    final: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
    timestamps: bool = False,
    accepts: Accepts = lambda kind, payload: True,
) -> tuple[tuple[str, ...], tuple[str, ...], list[Found], LogCursor]:
    """Return what ``split_lines`` does, and with ``timestamps`` the time of each line.

    That is the time of the message that holds the end of the line. None for ``messages`` means none.
    """
    if messages is None or not timestamps:
        data = b"" if messages is None else messages.data
        lines, found, cursor = split_lines(cursor, data, final=final, max_bytes=max_bytes, accepts=accepts)
        return lines, (cursor.after or "",) * len(lines) if timestamps else (), found, cursor
    # Message by message is several times slower, and right whatever a message reports or leaves open.
    all_lines: list[str] = []
    times: list[str] = []
    all_found: list[Found] = []
    columns = zip(messages.timestamps, messages.chunks, strict=True)
    for time, group in groupby(columns, key=itemgetter(0)):
        data = b"".join(chunk for _, chunk in group)
        lines, found, cursor = split_lines(cursor, data, max_bytes=max_bytes, accepts=accepts)
        all_lines += lines
        times += [time] * len(lines)
        all_found += found
    return tuple(all_lines), tuple(times), all_found, cursor


def open_line(cursor: LogCursor) -> str:
    """Return the present state of a line that has not ended; empty if it holds part of a message."""
    rest = base64.b64decode(cursor.pending)
    # The end may be the beginning of a character, or of a message's mark.
    text = rest.decode(errors="ignore") if MARK not in rest else ""
    mark = MARK.decode()
    cut = next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
    return _last_state(text[: len(text) - cut].encode()).decode().rstrip("\r")


def _texts(block: bytes) -> list[str]:
    """Return the lines of ``block``, each of which has an end."""
    # One decoding for all lines is faster than one for each. It is right only if no line has a
    # carriage return of its own, and if no broken character swallows a line end.
    returns, ends = block.count(b"\r"), block.count(b"\n")
    lines = block.decode(errors="replace").split("\r\n" if returns else "\n")[:-1]
    if len(lines) == ends and returns in (0, ends):
        return lines
    return [_text(line) for line in block.split(b"\n")[:-1]]


def _text(line: bytes) -> str:
    # A pseudo terminal ends lines with "\r\n" (PROTOCOL 1.8).
    return _last_state(line.rstrip(b"\r")).decode(errors="replace")


def _last_state(line: bytes) -> bytes:
    """Keep what a terminal would show of a line that a progress bar rewrote with carriage returns."""
    if b"\r" not in line:
        return line
    ended = line.rstrip(b"\r")
    return ended.rpartition(b"\r")[2] + line[len(ended) :]


def _character_border(data: bytes, limit: int) -> int:
    """Return the last index up to ``limit`` that cuts no UTF-8 character in two."""
    # A character has at most four bytes, and all but its first begin with the bits 10.
    for cut in range(limit, limit - 4, -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return limit
