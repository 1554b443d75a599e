"""Groups of log lines that Airflow's log viewer folds: ``::group::title`` to ``::endgroup::``.

The problem: a run may wait for hours, a line a minute, before the first line of its own. Airflow shows a
group closed, takes everything behind the mark in a record for its title, and whatever follows a group that
was never closed is hidden in it. A run may write such marks itself, and never close its last one.

The idea: the lines about provisioning and about pulling the image are a group each, if the task asks for
that. What the commands write is never folded by us: it is what a log is opened for. Our group is closed
before anything else is logged, and when this process leaves the log to another one.

Invariants: every group that is opened here is closed here, so each part of a deferred task's log is
balanced. Marks that the run wrote are records of their own (``RecordLimits.alone``), and those that it left
open are closed before its outcome is logged. A mark that closes nothing does nothing (measured: 3.3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_core import Event

Record = tuple[int, str]
GROUP = "::group::"
END = "::endgroup::"
MARKS = (GROUP, END)


class LogGroups:
    """The groups of one part of a run's log; ``is_wanted``: whether waiting is folded."""

    __slots__ = ("_is_wanted", "_of_run", "_title")

    def __init__(self, is_wanted: bool = False) -> None:
        self._is_wanted = is_wanted
        self._title: str | None = None
        # How many groups the run itself has opened and not closed.
        self._of_run = 0

    def around(self, event: Event, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records of an event, and what opens and closes groups around them."""
        from dstack_core import LogLines, RunFinished

        if isinstance(event, RunFinished):
            yield from self.close()
            yield from [(logging.INFO, END)] * self._of_run
            self._of_run = 0
        title, is_log = self._title_of(event), isinstance(event, LogLines)
        for level, text in records:
            if title != self._title:
                yield from self.close()
                if title is not None:
                    self._title = title
                    yield logging.INFO, f"{GROUP}{title}"
            if is_log and "group::" in text:
                self._of_run = max(0, self._of_run + text.count(GROUP) - text.count(END))
            yield level, text

    def close(self) -> Iterator[Record]:
        """Yield what closes the group that is open."""
        if self._title is not None:
            self._title = None
            yield logging.INFO, END

    def _title_of(self, event: Event) -> str | None:
        from dstack_core import RunStatus, StatusChanged, Waiting

        if not self._is_wanted or not isinstance(event, StatusChanged | Waiting):
            return None
        status = (
            event.status
            if isinstance(event, StatusChanged)
            else RunStatus(event.progress.status or "submitted")
        )
        if not status.is_before_start:
            return None
        name = event.progress.run_name
        return f"Setup of run {name}" if status is RunStatus.DOWNLOADING else f"Provisioning of run {name}"
