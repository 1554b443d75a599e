"""Read the logs of a run's jobs, each line once and in order (PROTOCOL 1.8).

The problem: the server has no follow mode, its ``start_time`` excludes the time itself although several
messages can have the same time, a message is a piece of output rather than a line, and servers before
0.19.16 have no page tokens.

The idea: one cursor for each job submission, which rides on every event: the time of the newest message read,
how many messages of that time were read, and the bytes of a line that has not ended. A read asks from just
before that time on and passes over the counted messages (``_wire.logs.Reader``); whole lines are split off
here.

Messages that the run reports are taken out of the lines (``_wire.reports``) and precede the lines of their
page, each with a progress of its own.

Invariants: the progress of an event covers exactly the lines of that event and those before, and likewise
the messages, so another process continues behind them without losing or repeating one. A submission is
``drained``, and not read again, once an empty read came after it had finished: its last lines are stored
before its status changes. An unfinished last line is reported only then; while it is open, its
state is shown from time to time (``partial_lines``), which takes nothing from the line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dstack_core._flow.partial_lines import PartialLines
from dstack_core._flow.steps import Flow, Op, call
from dstack_core._wire.api import Api
from dstack_core._wire.logs import (
    LogMessages,
    LogPage,
    Reader,
    most_kept,
    open_line,
    split_timed,
    start_time,
)
from dstack_core._wire.reports import DropReason, Found, Message
from dstack_core._wire.runs import Job, RunSnapshot, Submission
from dstack_core.errors import ProtocolError
from dstack_core.models.events import LogLines, PartialLine, Reported, ReportsDropped
from dstack_core.models.progress import LogCursor, Progress
from dstack_core.models.reports import KEPT_KINDS, ReportLimits


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How a log is read: the limits on what the run reports, and whether each line's time is wanted."""

    limits: ReportLimits
    timestamps: bool = False


def read_lines(
    api: Api, run: RunSnapshot, progress: Progress, options: LogOptions, partial: PartialLines
) -> Flow[Progress]:
    """Report what was logged since ``progress`` by every job submission; return the new progress."""
    for job in run.jobs:
        for submission in job.submissions:
            # A run that waits for capacity collects attempts. On a slow server, a request for each of them
            # would keep a process that takes over from the run's status for minutes.
            if submission.got_no_machine or not submission.may_have_logs:
                continue
            if not progress.cursor(submission.id).drained:
                source = _Source(run, job, submission)
                progress = yield from _read_submission(api, source, progress, options, partial)
    return progress


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a log comes from."""

    run: RunSnapshot
    job: Job
    submission: Submission

    def fields(self) -> tuple[int, int, int, str, int, int]:
        """Return the fields of an event that name it, from ``replica`` to ``replicas``."""
        jobs = self.run.jobs
        return (
            self.job.replica,
            self.job.node,
            self.submission.attempt,
            self.submission.id,
            len({job.node for job in jobs}),
            len({job.replica for job in jobs}),
        )


def _read_submission(
    api: Api, source: _Source, progress: Progress, options: LogOptions, partial: PartialLines
) -> Flow[Progress]:
    run, job, submission = source.run, source.job, source.submission
    limits = options.limits
    pages = PageReader(api, run.name, submission.id, progress.cursor(submission.id))
    # Nothing more is written for a run that has ended, whatever status its job still shows.
    complete = submission.is_finished or not run.is_active
    while True:
        messages = yield from pages.next_page()
        ended = messages is None
        before = progress.cursor(submission.id)
        lines, times, found, cursor = split_timed(
            # The reader moves the position on, this loop what is open: neither knows the other's part.
            replace(pages.cursor, pending=before.pending, parts=before.parts, shown=before.shown),
            messages,
            final=ended and complete,
            max_bytes=limits.max_bytes,
            timestamps=options.timestamps,
        )
        if found or before.reported:
            most = most_kept(limits.per_second, before.after, cursor.after)
            progress = yield from _report(found, run, job, submission, progress, most)
            cursor = replace(cursor, reported=max(0, before.reported - len(found)))
        progress = progress.with_cursor(submission.id, replace(cursor, drained=ended and complete))
        if lines:
            yield LogLines(progress, lines, *source.fields(), times)
            partial.line_ended(submission.id)
        if ended:
            return (yield from _report_open_line(source, progress, options, partial))


def _report_open_line(
    source: _Source, progress: Progress, options: LogOptions, partial: PartialLines
) -> Flow[Progress]:
    key = source.submission.id
    cursor = partial.due(key, progress.cursor(key))
    if cursor is not None and (line := open_line(cursor)):
        progress = progress.with_cursor(key, cursor)
        times = (cursor.after or "",) if options.timestamps else ()
        yield PartialLine(progress, line, *source.fields(), times)
    return progress


def _report(
    found: list[Found], run: RunSnapshot, job: Job, submission: Submission, progress: Progress, most: int
) -> Flow[Progress]:
    """Report the messages of a page that were not reported yet; return the progress behind the last one.

    While they are reported, the cursor stays before the page and counts them: a process that continues there
    reads the page again, whatever its size is then, and passes over as many messages.
    """
    cursor = progress.cursor(submission.id)
    dropped: dict[DropReason, int] = {}
    for number, message in enumerate(found[cursor.reported :], cursor.reported + 1):
        moved = progress.with_cursor(submission.id, replace(cursor, reported=number))
        if isinstance(message, Message) and (message.kind in KEPT_KINDS or most > 0):
            most -= message.kind not in KEPT_KINDS
            reported = progress.reported.with_message(message.kind, message.payload)
            # Whatever a run prints: only one that was submitted so holds its container.
            if run.hold_seconds is not None:
                reported = reported.with_hold(message.kind, message.payload, submission.attempt)
            progress = replace(moved, reported=reported)
            yield Reported(progress, message.kind, message.payload, job.replica, job.node, submission.attempt)
        else:
            reason: DropReason = "too many" if isinstance(message, Message) else message.reason
            dropped[reason] = dropped.get(reason, 0) + 1
            reported = replace(progress.reported, dropped=progress.reported.dropped + 1)
            progress = replace(moved, reported=reported)
    for reason, count in dropped.items():
        yield ReportsDropped(progress, reason, count)
    return progress


# A server's own log store may send empty pages before the next full one, so an empty page is not the end. A
# server that sends nothing else must not hold a follower in this loop forever; with a smaller number, a log
# with a long gap in such a store would be an error.
_MOST_EMPTY_PAGES = 1000


class PageReader:
    """The log of one submission, page by page, with page tokens and without (PROTOCOL 1.8, 2.4.7)."""

    def __init__(
        self, api: Api, run_name: str, submission_id: str, cursor: LogCursor, *, diagnose: bool = False
    ):
        self._api = api
        self._key = (run_name, submission_id)
        self._diagnose = diagnose
        self._reader = Reader(cursor)
        self._since = start_time(cursor)
        self._token: str | None = None
        self._at_end = False
        self._empty_pages = 0

    @property
    def cursor(self) -> LogCursor:
        """Return the position behind the last message returned."""
        return self._reader.cursor

    def next_page(self) -> Op[LogMessages | None]:
        """Return the next new messages, or None when there are none now.

        Raises ``ProtocolError`` for a server that sends empty pages without end.
        """
        while not self._at_end:
            page = yield from call(
                self._api.poll_logs(
                    *self._key, start_time=self._since, token=self._token, diagnose=self._diagnose
                )
            )
            fresh = self._reader.take(page.messages)
            self._turn(page, bool(fresh))
            self._empty_pages = 0 if fresh else self._empty_pages + 1
            if self._empty_pages > _MOST_EMPTY_PAGES:
                raise ProtocolError(
                    f"the log of run {self._key[0]} has no end: {_MOST_EMPTY_PAGES} pages in a row "
                    "had nothing new"
                )
            if fresh:
                return fresh
        return None

    def _turn(self, page: LogPage, any_fresh: bool) -> None:
        if page.next_token:
            self._token = page.next_token
        elif page.tokens or not any_fresh:
            self._at_end = True
        else:
            # Servers before 0.19.16 have no tokens: continue behind the last message until nothing is new.
            # They send the last messages again, so nothing new, not an empty page, is the end.
            self._since = start_time(self.cursor)
            self._reader = Reader(self.cursor)
