"""Log messages of job submissions, paged as the server's file storage does (PROTOCOL 1.8).

The messages of a submission are a list in the order of their times. Two invariants make it safe for a client
to remember only the time of the last message: times are whole milliseconds, and each is later than the one
before. If output comes faster, the times run ahead of the clock; `process` gathers output to avoid that.

``start_time`` and ``end_time`` are exclusive and found by bisection, so that a page at the end of a long log
costs as much as one at its beginning. A ``next_token`` is a position in the messages after ``start_time``,
counted from the oldest one in both directions: new messages are appended and change no position.
"""

from __future__ import annotations

import base64
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any

from dstack_core import clock
from dstack_core.local.bodies import PollLogsRequest
from dstack_core.local.errors import bad_request

# The resolution of the server's timestamps.
_TICK = timedelta(milliseconds=1)
_TIME = attrgetter("timestamp")
# The longest delay before the end of a job, or output that arrives just before the wait, is noticed.
_FOLLOW_SECONDS = 0.1


def iso(moment: datetime) -> str:
    """Return a time as the server writes it: UTC, microseconds, ``Z`` (PROTOCOL 1.1)."""
    # ``strftime`` takes ten times as long, and the reply for a run that was retried for hours has hundreds.
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class LogMessage:
    """A chunk of output and the time it was read, in whole milliseconds."""

    timestamp: datetime
    text: bytes

    def wire(self) -> dict[str, Any]:
        """Return the message as JSON data."""
        return {
            "timestamp": iso(self.timestamp),
            "log_source": "stdout",
            "message": base64.b64encode(self.text).decode(),
        }


def _aware(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


class LogStore:
    """The log messages of every job submission, in memory."""

    def __init__(self) -> None:
        self._messages: dict[tuple[str, str], list[LogMessage]] = {}
        self._news = threading.Condition()

    def append(self, run_name: str, submission_id: str, text: bytes) -> None:
        """Add a chunk; its timestamp is later than that of the chunk before."""
        messages = self._messages.setdefault((run_name, submission_id), [])
        now = clock.now()
        now = now.replace(microsecond=now.microsecond // 1000 * 1000)
        if messages and now <= messages[-1].timestamp:
            now = messages[-1].timestamp + _TICK
        messages.append(LogMessage(now, text))
        with self._news:
            self._news.notify_all()

    def text(self, run_name: str, submission_id: str) -> bytes:
        """Return the whole output of a submission so far."""
        return b"".join(one.text for one in list(self._messages.get((run_name, submission_id), ())))

    def follow(
        self, run_name: str, submission_id: str, start: datetime | None, ended: Callable[[], bool]
    ) -> Iterator[bytes]:
        """Yield the output since a time, then new output until the job has ended; blocks its thread."""
        position = 0
        while True:
            # Check before reading, so that what a job wrote before it ended is among the messages.
            finished = ended()
            messages = self._messages.get((run_name, submission_id), [])[position:]
            position += len(messages)
            yield from (one.text for one in messages if start is None or one.timestamp >= start)
            if finished:
                return
            if not messages:
                with self._news:
                    self._news.wait(_FOLLOW_SECONDS)

    def poll(self, request: PollLogsRequest) -> dict[str, Any]:
        """Return a page of messages; raises ApiError 400 for a bad `next_token`."""
        offset = 0
        if request.next_token is not None:
            if not request.next_token.isdecimal():
                raise bad_request(
                    f"Invalid next_token: {request.next_token}. Must be a non-negative integer."
                )
            offset = int(request.next_token)
        messages: list[LogMessage] = []
        if not request.diagnose:
            messages = self._messages.get((request.run_name, str(request.job_submission_id)), [])
        after, before = _aware(request.start_time), _aware(request.end_time)
        # Messages are in the order of their times, so no page of a long log needs a search from its start.
        begin = 0 if after is None else bisect_right(messages, after, key=_TIME)
        finish = len(messages) if before is None else bisect_left(messages, before, key=_TIME)
        count = max(0, finish - begin)
        # Positions count from the oldest message, so that a token stays valid while messages arrive.
        if request.descending:
            end = count if request.next_token is None else min(offset, count)
            start = max(0, end - max(request.limit, 1))
            page, token = messages[begin + start : begin + end][::-1], start or None
        else:
            end = min(offset + max(request.limit, 1), count)
            page, token = messages[begin + offset : begin + end], end if end < count else None
        return {
            "logs": [message.wire() for message in page],
            "external_url": None,
            "next_token": None if token is None else str(token),
        }
