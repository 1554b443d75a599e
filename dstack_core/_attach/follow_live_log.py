"""Following the output of a run's only job live, each byte once, even if connections break (PROTOCOL 4.6).

The problem: the runner in the container sends the output at once, but only while the container can be
reached, and always from its first byte. The server keeps a copy, seconds late, without terminal escape
sequences and in other pieces. A connection may break at any byte, and the end of a stream may mean that the
output is complete, that the runner was shut down, or that a retry is coming.

The idea: ``Position`` counts what was reported of a submission: bytes, whole lines, and the bytes of the
unfinished line. A stream that is opened again is cut at the bytes, the server's copy at the lines. The live
stream is preferred, and the copy is the fallback for everything that the stream did not deliver.

Invariants:
  * Submissions (the attempts of the job) are reported one after the other, each completely.
  * A closed stream alone does not prove that the output is complete. The server has to report that the
    command ended by itself; otherwise the copy is read too, until the submission has finished.
  * Nothing here does I/O: the flow yields requests, sleeps and calls of the ``LiveSource``.
"""

from __future__ import annotations

from typing import Protocol

from dstack_core._flow.logs import PageReader
from dstack_core._flow.raw_log import LogChunk
from dstack_core._flow.steps import Flow, Sleep, call, do
from dstack_core._wire.api import Api
from dstack_core._wire.attach import Approach, Route
from dstack_core._wire.log_position import Position
from dstack_core._wire.runs import RunSnapshot, Submission
from dstack_core.errors import AttachError
from dstack_core.models.progress import LogCursor, Progress
from dstack_core.models.records import LogBytes

# Tries in a row to reopen a live stream that bring no new byte, and the pause between them in seconds.
# Chosen, not measured: at each try the tunnel below waits up to 10 s for its own reconnect. More tries delay
# the server's copy while the container cannot be reached; fewer give up the live log for one short break.
_REOPENINGS = 4
_PAUSE = 1.0
# Seconds to wait, after a stream has ended, for the server to record how the submission ended. Measured on
# untouched servers: 10 to 90 s (PROTOCOL 5.4). If it takes longer, the server's copy is read, which only
# costs requests; less would read the copy of every job.
_LONGEST_DOUBT = 60.0
# Termination reasons with which the command ended, so that the end of the stream is the end of the output.
_ENDED_BY_ITSELF = frozenset({"done_by_runner", "container_exited_with_error"})


class Stream(Protocol):
    """The output of one job, from its first byte on."""

    def read(self) -> bytes | None:
        """Return the next bytes, ``b""`` if none came for a while, None at the end; or ``AttachError``."""

    def close(self) -> None:
        """Close the connection."""


class LiveSource(Protocol):
    """The connection to the container of one job submission at a time."""

    @property
    def submission_id(self) -> str:
        """The submission whose container it is connected to."""

    @property
    def is_closed(self) -> bool:
        """Whether the caller closed it."""

    def open_logs(self) -> Stream:
        """Return the output. Raises ``AttachError``."""

    def move(self, route: Route) -> None:
        """Connect to another container. Raises ``AttachError``."""

    def stop_reconnecting(self) -> None:
        """Close the connection for good: the run has ended."""


def live_chunks(
    api: Api, progress: Progress, source: LiveSource, *, node: int, poll_interval: float
) -> Flow[None]:
    """Report the output of every submission of the job, in order, until the server shows that no more comes.

    Args:
        api: The requests of the project.
        progress: Which run it is; every chunk carries it.
        source: The connection to the container; the flow ends early once it is closed.
        node: The node of the job.
        poll_interval: Seconds between two requests to the server.

    Raises:
        RunNotFoundError: The run was deleted.
        ServerError: The other server errors.
    """
    finished: set[str] = set()
    while not source.is_closed:
        approach = yield from call(api.get_approach(progress.run_name, progress.run_id or "", node))
        submission = next((item for item in _submissions(approach.run) if item.id not in finished), None)
        if submission is None:
            # A run that is ending submits the job no more, so every submission was reported.
            if approach.run.status.is_ending:
                return (yield from do(source.stop_reconnecting))
        elif submission.may_have_logs or approach.run.status.is_ending:
            yield from _submission(api, progress, source, approach, submission, poll_interval)
            finished.add(submission.id)
            continue
        yield Sleep(poll_interval)


def _submission(
    api: Api,
    progress: Progress,
    source: LiveSource,
    approach: Approach,
    submission: Submission,
    poll_interval: float,
) -> Flow[None]:
    """Report all of one submission's output: first live, what is missing from the server's copy."""
    position = Position()
    # The container of a finished submission may be gone, and the server's copy of its output is complete.
    if not submission.is_finished and (yield from _leads_to(source, approach, submission)):
        sent_all = yield from _stream(api, progress, source, submission, position)
        if sent_all and (yield from _has_ended_by_itself(api, progress, submission, poll_interval)):
            return
    yield from _poll(api, progress, source, submission, position, poll_interval)


def _leads_to(source: LiveSource, approach: Approach, submission: Submission) -> Flow[bool]:
    """Connect the source to the submission's container if it is not yet; return whether it is connected."""
    if source.submission_id == submission.id:
        return True
    route = approach.route
    if route is None or route.submission_id != submission.id:
        return False
    try:
        yield from do(lambda: source.move(route))
    except AttachError:
        return False
    return True


def _stream(
    api: Api, progress: Progress, source: LiveSource, submission: Submission, position: Position
) -> Flow[bool]:
    """Report what the runner sends; True if it ended the stream, False if it can no longer be reached."""
    fruitless = 0
    while fruitless < _REOPENINGS and not source.is_closed:
        seen = position.given
        try:
            stream = yield from do(source.open_logs)
            try:
                return (yield from _read(api, progress, stream, submission, position))
            finally:
                stream.close()
        except AttachError:
            if (yield from _is_finished(api, progress, submission)):
                return False
        # Only reconnects without a new byte count: a stream that breaks often but gets further is fine.
        if position.given > seen:
            fruitless = 0
        else:
            fruitless += 1
            yield Sleep(_PAUSE)
    return False


def _read(
    api: Api, progress: Progress, stream: Stream, submission: Submission, position: Position
) -> Flow[bool]:
    """Report the new bytes of one stream; True if it ended, False if the job has and nothing comes."""
    replay = position.replay()
    while True:
        data = yield from do(stream.read)
        if data is None:
            return True
        if data:
            fresh = replay.fresh(data)
            if fresh:
                yield LogChunk(progress, _owned(fresh, submission))
        # No bytes for a while: the job is quiet, or the container is gone and nothing will ever arrive.
        elif (yield from _is_finished(api, progress, submission)):
            return False


def _has_ended_by_itself(
    api: Api, progress: Progress, submission: Submission, poll_interval: float
) -> Flow[bool]:
    """Wait until the server records the end of the submission; return whether its command ended by itself.

    Only then was the end of the stream the end of the output: a runner that is shut down closes it too.
    """
    waited = 0.0
    while True:
        now = yield from _fetch(api, progress, submission)
        if now is not None and now.reason in _ENDED_BY_ITSELF:
            return True
        if now is None or now.is_finished or waited >= _LONGEST_DOUBT:
            return False
        yield Sleep(poll_interval)
        waited += poll_interval


def _poll(
    api: Api,
    progress: Progress,
    source: LiveSource,
    submission: Submission,
    position: Position,
    poll_interval: float,
) -> Flow[None]:
    """Report from the server's copy what was not reported yet, until the submission has finished."""
    rest = position.rest()
    cursor = LogCursor()
    while True:
        # Before the pages: what they show after the end was recorded is everything.
        over = yield from _is_finished(api, progress, submission)
        pages = PageReader(api, progress.run_name, submission.id, cursor)
        while (messages := (yield from pages.next_page())) is not None:
            cursor = pages.cursor
            fresh = rest.fresh(messages.data)
            if fresh:
                yield LogChunk(progress, _owned(fresh, submission))
        if over or source.is_closed:
            return
        yield Sleep(poll_interval)


def _owned(data: bytes, submission: Submission) -> LogBytes:
    return LogBytes(data, attempt=submission.attempt, submission_id=submission.id)


def _is_finished(api: Api, progress: Progress, submission: Submission) -> Flow[bool]:
    now = yield from _fetch(api, progress, submission)
    return now is None or now.is_finished


def _fetch(api: Api, progress: Progress, submission: Submission) -> Flow[Submission | None]:
    """Fetch the submission; None if the run has ended and it has not, or if the run is gone."""
    run = yield from call(api.get_run(progress.run_name, progress.run_id))
    if run is None:
        return None
    now = next((item for item in _submissions(run) if item.id == submission.id), None)
    return now if run.is_active or (now and now.is_finished) else None


def _submissions(run: RunSnapshot) -> list[Submission]:
    return [submission for job in run.jobs for submission in job.submissions]
