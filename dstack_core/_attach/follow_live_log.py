"""Follow the output of a run's only job live, each byte once, whatever gets cut on the way (PROTOCOL 4.6)."""

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

_REOPENINGS = 4
_PAUSE = 1.0
_LONGEST_DOUBT = 60.0
_ENDED_BY_ITSELF = frozenset({"done_by_runner", "container_exited_with_error"})


class Stream(Protocol):
    """Be the output of one job from its first byte on."""

    def read(self) -> bytes | None:
        """Return the next bytes, none after a while of silence, None behind the end; or ``AttachError``."""

    def close(self) -> None:
        """Leave."""


class LiveSource(Protocol):
    """Be the connection to the container of one job submission at a time."""

    @property
    def submission_id(self) -> str:
        """Return the submission it leads to."""

    @property
    def is_closed(self) -> bool:
        """Tell whether the caller closed it."""

    def open_logs(self) -> Stream:
        """Return the output. Raises ``AttachError``."""

    def move(self, route: Route) -> None:
        """Lead to another container. Raises ``AttachError``."""

    def rest(self) -> None:
        """Lead nowhere any more: the run is over."""


def live_chunks(
    api: Api, progress: Progress, source: LiveSource, *, node: int, poll_interval: float
) -> Flow[None]:
    """Report the output of every submission of the job, in order, until the server says that no more comes.

    The live stream is preferred; where it cannot be had the server's copy is polled, from the same place
    on. A closed stream alone is no proof of the end: the server is asked. Ends early when ``source`` is
    closed. Raises ``RunNotFoundError`` and the server errors.
    """
    finished: set[str] = set()
    while not source.is_closed:
        approach = yield from call(api.get_approach(progress.run_name, progress.run_id or "", node))
        submission = next((item for item in _submissions(approach.run) if item.id not in finished), None)
        if submission is None:
            if approach.run.status.is_ending:
                return (yield from do(source.rest))
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
    """Report all of one submission's output."""
    position = Position()
    if not submission.is_finished and (yield from _leads_to(source, approach, submission)):
        sent_all = yield from _stream(api, progress, source, submission, position)
        if sent_all and (yield from _has_ended_by_itself(api, progress, submission, poll_interval)):
            return
    yield from _poll(api, progress, source, submission, position, poll_interval)


def _leads_to(source: LiveSource, approach: Approach, submission: Submission) -> Flow[bool]:
    """Make the source lead to the submission's container; tell whether it does."""
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
    """Report what the runner sends until it says that this is all (True), or cannot be reached any more."""
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
        if position.given > seen:
            fruitless = 0
        else:
            fruitless += 1
            yield Sleep(_PAUSE)
    return False


def _read(
    api: Api, progress: Progress, stream: Stream, submission: Submission, position: Position
) -> Flow[bool]:
    """Report the new bytes of one stream until it ends (True), or is silent though the job is over."""
    replay = position.replay()
    while True:
        data = yield from do(stream.read)
        if data is None:
            return True
        if data:
            fresh = replay.fresh(data)
            if fresh:
                yield LogChunk(progress, _owned(fresh, submission))
        elif (yield from _is_finished(api, progress, submission)):
            return False


def _has_ended_by_itself(
    api: Api, progress: Progress, submission: Submission, poll_interval: float
) -> Flow[bool]:
    """Wait a while for the server to know that the submission is over; tell whether its command ended.

    Only then was the end of the stream the end of the output: a runner that was shut down closes it too.
    """
    waited = 0.0
    while True:
        now = yield from _look(api, progress, submission)
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
    """Report from the server's copy what was not given out yet, until the submission is over."""
    rest = position.rest()
    cursor = LogCursor()
    while True:
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
    now = yield from _look(api, progress, submission)
    return now is None or now.is_finished


def _look(api: Api, progress: Progress, submission: Submission) -> Flow[Submission | None]:
    """Ask the server for the submission; None when the run is over without one, or gone."""
    run = yield from call(api.get_run(progress.run_name, progress.run_id))
    if run is None:
        return None
    now = next((item for item in _submissions(run) if item.id == submission.id), None)
    return now if run.is_active or (now and now.is_finished) else None


def _submissions(run: RunSnapshot) -> list[Submission]:
    return [submission for job in run.jobs for submission in job.submissions]
