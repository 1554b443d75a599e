"""Read a run's log as bytes, for ``Run.logs`` of a run that is not attached.

The problem: a chunk ends where the runner's read ended, so when the output of several jobs is written one
after another, half a line of one job would be continued by a line of another.

The idea: the bytes of a single job pass through untouched. As soon as several jobs are read, what follows the
last line end of a chunk waits here for the next chunk of the same job.

Invariants: the bytes of each submission keep their order, and none is lost: a part that waits is reported at
the end of its log, with a line end, or as soon as it is longer than 64 KiB. As in ``follow``, one round reads
the status first and the log after it, so the round that sees the run finished reads its last bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dstack_core._flow.accepted_stops import Stops
from dstack_core._flow.logs import PageReader
from dstack_core._flow.queries import get_known_run
from dstack_core._flow.steps import Flow, Sleep
from dstack_core._wire.api import Api
from dstack_core._wire.logs import LogMessages
from dstack_core._wire.runs import Job, RunSnapshot, Submission
from dstack_core.errors import ConfigurationError
from dstack_core.models.events import Event
from dstack_core.models.progress import LogCursor, Progress
from dstack_core.models.records import LogBytes

_LINE_END = b"\r\n"
# How much of a line without an end is held back, the same as in ``_wire.logs.split_lines``. Without a limit,
# a progress bar that never ends its line would fill the memory; a small one would cut ordinary long lines.
_LONGEST_REST = 64 * 1024


@dataclass(frozen=True, slots=True)
class LogChunk(Event):
    """Bytes of the log as the runner wrote them."""

    data: LogBytes


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """Options with the meaning of ``Run.logs``; ``poll_interval`` in seconds, ``node`` None for all."""

    start_time: datetime | None = None
    follow: bool = False
    poll_interval: float = 5.0
    diagnose: bool = False
    node: int | None = None


def read_chunks(api: Api, progress: Progress, options: ChunkOptions, stops: Stops) -> Flow[None]:
    """Report every chunk logged from the start time on; with ``follow`` until the run is finished.

    If several jobs are read, chunks are whole lines: the beginning of a line waits for its end. At the end
    of a log, a line without an end gets one.
    """
    since = options.start_time
    begin = LogCursor(after=since.astimezone(UTC).isoformat(timespec="microseconds") if since else None)
    rests: dict[str, LogBytes] = {}
    while True:
        run = yield from get_known_run(api, progress.run_name, progress.run_id)
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
    # The nodes of a run without jobs are not known yet, so none can be called wrong.
    if run.jobs and not jobs:
        known = ", ".join(str(number) for number in sorted({job.node for job in run.jobs}))
        raise ConfigurationError(f"node: expected a node of run {run.name} ({known}), got {node!r}.")
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
    """Cut behind the last line end; a rest longer than the limit is not held back."""
    whole, end, rest = chunk.rpartition(b"\n")
    if len(rest) > _LONGEST_REST:
        return chunk, _same(chunk, b"")
    return _same(chunk, whole + end), _same(chunk, rest)


def _same(source: LogBytes, data: bytes) -> LogBytes:
    # Slices and sums of bytes are plain bytes, without what names their origin.
    return LogBytes(
        data,
        node=source.node,
        replica=source.replica,
        attempt=source.attempt,
        submission_id=source.submission_id,
        timestamp=source.timestamp,
    )
