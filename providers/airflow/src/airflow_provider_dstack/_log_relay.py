"""What a run's events become in Airflow's log, and how much of the log was relayed, exact to the line.

The worker and the triggerer share this. ``records`` makes log records of events. ``LogPosition`` is how a
deferred task continues a log in another process.

The problem: a cursor of ``dstack_core`` marks the end of a page, and a page holds up to 1000 messages, which
may be megabytes. A trigger that relays 100 kB/s spends a minute inside one page, and has to be able to save
its position, or leave the rest to a worker, at any time.

The idea: the progress of the last page that was relayed whole, and beside it, for each submission, the number
of lines relayed of what follows. The next process reads from that progress and skips so many lines.

Invariant: the same cursor yields the same lines again, however the server cuts its pages. The exceptions are
the pieces of a line without an end, which come in one piece once the end is there. So no position counts a
piece as a line: an event may end with pieces, and behind it only its own progress is a position.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._log_groups import MARKS

if TYPE_CHECKING:
    from airflow_provider_dstack._log_groups import LogGroups
    from airflow_provider_dstack._run_reports import RunReports
    from dstack_core import Event, LogLines, Progress
    from dstack_core.integration import LogRelay

# Of ``dstack_core.integration``, which a DAG file does not import; a test holds them equal.
DEFAULT_LOG_BUDGET = 10_000_000
# A record of its own reads best. A triggerer takes up to 0.5 ms of its loop for each: 16 ms for so many.
_FEW_LINES = 32
# A part is packed into records of 16 KiB, so it should fill several; a trigger that has to leave finishes one
# part, which costs it some tens of milliseconds.
_PART_CHARACTERS = 64 * 1024
# Fewer lines than this would be logged a record each, which is for a log that is read live.
_PART_LINES = _FEW_LINES + 1
# ``dstack_core`` cuts a line without an end into pieces of 64 KiB, of at most four bytes a character. With a
# larger number a position could lie behind a piece, and the next process would skip the wrong lines.
_PIECE_CHARACTERS = 16_000


def new_relay(**options: Any) -> LogRelay:
    """Return the relay of one run; ``options`` are those of ``LogRelay``."""
    from dstack_core.integration import LogRelay, RecordLimits

    return LogRelay(limits=RecordLimits(few_lines=_FEW_LINES, alone=MARKS), **options)


def records(
    relay: LogRelay, event: Event, reports: RunReports | None = None, groups: LogGroups | None = None
) -> Iterator[tuple[int, str]]:
    """Yield ``(logging level, text)`` for an event, the outcome of the run included.

    ``reports`` receives what the run reports beside its log, ``groups`` folds what is logged while it waits.
    """
    found = _records(relay, event, reports)
    yield from found if groups is None else groups.around(event, found)


def _records(relay: LogRelay, event: Event, reports: RunReports | None) -> Iterator[tuple[int, str]]:
    from dstack_core import Reported, RunFinished
    from dstack_core.integration import describe_outcome, utilization_lines

    yield from relay.records(event)
    if isinstance(event, Reported) and reports is not None:
        yield from reports.take(event)
    elif isinstance(event, RunFinished):
        yield logging.INFO, describe_outcome(event.outcome)
        for line in utilization_lines(event.outcome):
            yield logging.INFO, line
        if reports is not None:
            reports.finished(event.outcome)


class LogPosition:
    """What was relayed of a run's log: ``progress`` of whole events, and lines of those that follow."""

    __slots__ = ("_ahead", "progress")

    def __init__(self, progress: Progress, ahead: Mapping[str, int]) -> None:
        self.progress = progress
        self._ahead = dict(ahead)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LogPosition:
        """Read back what ``to_dict`` returned, here or in another version."""
        from dstack_core import Progress

        return cls(Progress.from_dict(state["progress"]), state.get("ahead") or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the position as JSON-plain values."""
        return {"progress": self.progress.to_dict(), "ahead": dict(self._ahead)}

    def new_parts(self, event: LogLines) -> Iterator[tuple[LogLines, int]]:
        """Yield what of an event is not relayed yet, in parts with their number of characters."""
        ahead = self._ahead.get(event.submission_id, 0)
        lines, times = event.lines[ahead:], event.times[ahead:]
        start = characters = 0
        for end, line in enumerate(lines, 1):
            characters += len(line)
            is_part = characters >= _PART_CHARACTERS and end - start >= _PART_LINES
            if end == len(lines) or (is_part and len(line) < _PIECE_CHARACTERS):
                yield replace(event, lines=lines[start:end], times=times[start:end]), characters
                start, characters = end, 0

    def relayed(self, part: LogLines, event: LogLines) -> None:
        """Move behind a part of an event, and behind the event with its last part."""
        key = part.submission_id
        self._ahead[key] = self._ahead.get(key, 0) + len(part.lines)
        if self._ahead[key] >= len(event.lines):
            self.passed(event)

    def passed(self, event: Event) -> None:
        """Move behind a whole event, unless its last part has moved the position there already."""
        from dstack_core import LogLines

        if event.progress is self.progress:
            return
        if isinstance(event, LogLines):
            left = self._ahead.pop(event.submission_id, 0) - len(event.lines)
            if left > 0:
                self._ahead[event.submission_id] = left
        self.progress = event.progress


def position_in(state: Mapping[str, Any]) -> Any:
    """Return what in a saved state depends on how much of the log was relayed."""
    return state["progress"].get("cursors", {}), state.get("ahead") or {}


def position_and_status_in(state: Mapping[str, Any]) -> Any:
    """Return what in a saved state depends on what the callbacks were called for."""
    return position_in(state), state["progress"].get("status")
