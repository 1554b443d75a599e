"""Read a run's raw log bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dstack_core._flow.logs import PageReader
from dstack_core._flow.queries import look
from dstack_core._flow.steps import Flow, Sleep
from dstack_core._flow.stop import Stops
from dstack_core._wire.api import Api
from dstack_core._wire.logs import LogMessages
from dstack_core._wire.runs import Job, RunSnapshot, Submission
from dstack_core.errors import ConfigurationError
from dstack_core.models.events import Event
from dstack_core.models.progress import LogCursor, Progress
from dstack_core.models.records import LogBytes

_LINE_END = b"\r\n"
_LONGEST_REST = 64 * 1024


@dataclass(frozen=True, slots=True)
class LogChunk(Event):
    """Carry bytes of the log as the runner wrote them."""

    data: LogBytes


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """Say what to read: as ``Run.logs`` says; ``poll_interval`` in seconds, ``node`` None for all."""

    start_time: datetime | None = None
    follow: bool = False
    poll_interval: float = 5.0
    diagnose: bool = False
    node: int | None = None


def read_chunks(api: Api, progress: Progress, options: ChunkOptions, stops: Stops) -> Flow[None]:
    """Report every chunk logged from the start time on; with ``follow`` until the run is finished.

    As soon as several jobs are read, chunks are whole lines: what a job wrote of a line waits for the
    rest of it. At the end of its log, a line without an end gets one.
    """
    since = options.start_time
    begin = LogCursor(after=since.astimezone(UTC).isoformat(timespec="microseconds") if since else None)
    rests: dict[str, LogBytes] = {}
    while True:
        run = yield from look(api, progress.run_name, progress.run_id)
        yield from stops.insist(api, run)
        last_round = not (options.follow and run.is_active)
        jobs = _chosen(run, options.node)
        for job in jobs:
            for submission in job.submissions:
                if not submission.may_have_logs:
                    continue
                cursor = progress.cursors.get(submission.id, begin)
                pages = PageReader(api, run.name, submission.id, cursor, diagnose=options.diagnose)
                while (messages := (yield from pages.next_page())) is not None:
                    progress = progress.with_cursor(submission.id, pages.cursor)
                    chunk = _chunk(job, submission, messages, rests.pop(submission.id, b""))
                    if len(jobs) > 1:
                        chunk, rests[submission.id] = _at_line_end(chunk)
                    if chunk:
                        yield LogChunk(progress, chunk)
                rest = rests.get(submission.id)
                if rest and (last_round or submission.is_finished):
                    del rests[submission.id]
                    yield LogChunk(progress, _same(rest, rest + _LINE_END))
        if last_round:
            return
        yield Sleep(options.poll_interval)


def _chosen(run: RunSnapshot, node: int | None) -> Sequence[Job]:
    if node is None:
        return run.jobs
    jobs = [job for job in run.jobs if job.node == node]
    if run.jobs and not jobs:
        known = ", ".join(str(number) for number in sorted({job.node for job in run.jobs}))
        raise ConfigurationError(f"node: {node!r} is no node of run {run.name}; it has {known}")
    return jobs


def _chunk(job: Job, submission: Submission, messages: LogMessages, rest: bytes) -> LogBytes:
    return LogBytes(
        rest + messages.data,
        node=job.node,
        replica=job.replica,
        attempt=submission.attempt,
        submission_id=submission.id,
        timestamp=datetime.fromisoformat(messages.timestamps[-1]),
    )


def _at_line_end(chunk: LogBytes) -> tuple[LogBytes, LogBytes]:
    """Cut behind the last line end; a rest that only grows is not kept for ever."""
    whole, end, rest = chunk.rpartition(b"\n")
    if len(rest) > _LONGEST_REST:
        return chunk, _same(chunk, b"")
    return _same(chunk, whole + end), _same(chunk, rest)


def _same(source: LogBytes, data: bytes) -> LogBytes:
    return LogBytes(
        data,
        node=source.node,
        replica=source.replica,
        attempt=source.attempt,
        submission_id=source.submission_id,
        timestamp=source.timestamp,
    )
