"""When the state of an unfinished line is reported.

The problem: a progress bar rewrites one line for hours and ends it once, and a prompt never does, so a log of
whole lines shows nothing of them. But any busy log may be read in the middle of a line, and showing each of
these would double the log.

The idea: an unfinished line is reported once it has been open for some seconds in which no other line ended,
then again at most every half a minute, and only if it has changed. Whether its present state was reported
rides on the log's cursor, so a prompt that stands still is not repeated, in another process neither. A line
that was open already when another process took over is due at once: a handover takes seconds itself.

Invariant: nothing here changes what is pending, so the line itself is still reported once, when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from dstack_core.models.progress import LogCursor

# A log is read every few seconds, so this is two or three reads without the end of a line. Sooner, ordinary
# lines would be shown twice; later, a progress bar looks as if the run hung.
_OPEN_SECONDS = 10.0
# As often as progress that a run reports itself: a training of three hours adds 360 lines to its log.
_SECONDS_BETWEEN = 30.0


class PartialLines:
    """The times at which the open lines of one run are reported next, by job submission."""

    __slots__ = ("_clock", "_due")

    def __init__(self, clock: Callable[[], float], taken_over: Mapping[str, LogCursor] | None = None) -> None:
        self._clock = clock
        cursors = (taken_over or {}).items()
        # Thousands of runs may be followed, and most have no open line: no dict before it is needed.
        self._due = {key: -math.inf for key, cursor in cursors if cursor.pending} or None

    def line_ended(self, submission_id: str) -> None:
        """Note that a line has ended: what is open now is another one."""
        if self._due is not None:
            self._due.pop(submission_id, None)

    def due(self, submission_id: str, cursor: LogCursor) -> LogCursor | None:
        """Return the cursor behind the report of an open line if it is time for one, else None."""
        if not cursor.pending or cursor.drained:
            return None
        if self._due is None:
            self._due = {}
        now = self._clock()
        if now < self._due.setdefault(submission_id, now + _OPEN_SECONDS) or cursor.shown:
            return None
        self._due[submission_id] = now + _SECONDS_BETWEEN
        return replace(cursor, shown=True)
