"""The live log yields each byte once, whatever is cut, and ends only when the server reports the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dstack_core._attach.follow_live_log import live_chunks
from dstack_core._flow.raw_log import LogChunk
from dstack_core._wire.api import Api
from dstack_core._wire.attach import Route
from dstack_core.errors import AttachError, RunNotFoundError
from dstack_core.models.progress import Progress
from tests.core.scripted import MISSING, Answer, Driver, Script, page, reply, run_json

CUT = AttachError("cut")
CLOSED = None
SILENT = b""
Frames = Sequence[bytes | AttachError | None]


class Stream:
    """A stream with scripted frames that stays silent after the last one."""

    def __init__(self, frames: Frames) -> None:
        self.frames = list(frames)
        self.is_closed = False

    def read(self) -> bytes | None:
        assert not self.is_closed
        frame = self.frames.pop(0) if self.frames else SILENT
        if isinstance(frame, AttachError):
            raise frame
        return frame

    def close(self) -> None:
        self.is_closed = True


class Source:
    """A source of scripted streams, one after the other; after the last one, opening fails."""

    def __init__(self, *streams: Frames, submission_id: str = "sub-0", moves: bool = True) -> None:
        self.submission_id = submission_id
        self.is_closed = False
        self.rests = False
        self.opened: list[Stream] = []
        self._streams = list(streams)
        self._moves = moves

    def open_logs(self) -> Stream:
        if not self._streams:
            raise AttachError("the runner did not start the live log")
        self.opened.append(Stream(self._streams.pop(0)))
        return self.opened[-1]

    def move(self, route: Route) -> None:
        if not self._moves:
            raise AttachError("no way")
        self.submission_id = route.submission_id

    def stop_reconnecting(self) -> None:
        self.rests = True


def running() -> dict[str, Any]:
    return run_json("running")


def job(status: str, reason: str | None = None, *, run: str = "running") -> dict[str, Any]:
    """Return the run while its only submission has that status."""
    body = run_json(run)
    for submission in (body["latest_job_submission"], body["jobs"][0]["job_submissions"][-1]):
        submission |= {"status": status, "termination_reason": reason}
    return body


def done() -> dict[str, Any]:
    return job("done", "done_by_runner", run="terminating")


def unreachable() -> dict[str, Any]:
    return job("failed", "instance_unreachable", run="terminating")


def read(driver: Driver, source: Source, script: Script) -> bytes:
    flow = live_chunks(Api("http://s", "main"), Progress("train", "id-1"), source, node=0, poll_interval=5)
    events = driver.events(flow, script)
    return b"".join(event.data for event in events if isinstance(event, LogChunk))


def server(*runs: dict[str, Any], polled: str = "") -> Script:
    pages: list[Answer] = [page((1, polled)) if polled else page()]
    return Script(runs__get=[reply(run) for run in runs], logs__poll=pages)


def test_a_stream_is_passed_on_as_it_arrives_and_not_polled(driver: Driver) -> None:
    script = server(running(), done())
    source = Source([b"one\r\n", b"two\r\n", CLOSED])
    assert read(driver, source, script) == b"one\r\ntwo\r\n"
    assert "logs/poll" not in script.paths()
    assert source.rests
    assert [stream.is_closed for stream in source.opened] == [True]


@pytest.mark.parametrize("already", [b"", b"o", b"one\r\n", b"one\r\ntw", b"one\r\ntwo\r\nthr"])
def test_a_stream_that_is_cut_anywhere_is_resumed(driver: Driver, already: bytes) -> None:
    whole = b"one\r\ntwo\r\nthree\r\n"
    first: Frames = [already, CUT] if already else [CUT]
    source = Source(first, [whole[:7], whole[7:9], CUT], [whole, CLOSED])
    assert read(driver, source, server(running(), running(), running(), done())) == whole
    assert len(source.opened) == 3


def test_the_end_of_a_stream_is_not_the_end_of_the_job(driver: Driver) -> None:
    # A runner that is shut down closes its stream too: the server knows that the job keeps running.
    script = server(*[running()] * 20, done(), polled="one\r\ntwo\r\nthree\r\n")
    assert read(driver, Source([b"one\r\ntwo", CLOSED]), script) == b"one\r\ntwo\r\nthree\r\n"
    assert 60 <= sum(driver.clock.slept) <= 120


def test_the_log_of_a_job_that_did_not_end_by_itself_is_completed_from_the_server(driver: Driver) -> None:
    script = server(running(), unreachable(), polled="one\r\ntwo\r\n")
    assert (
        read(driver, Source([b"\x1b[1mone\x1b[0m\r\nt", CLOSED]), script) == b"\x1b[1mone\x1b[0m\r\ntwo\r\n"
    )


def test_the_log_ends_only_when_the_server_reports_the_end(driver: Driver) -> None:
    script = server(running(), running(), running(), done())
    assert read(driver, Source([b"x\n", CLOSED]), script) == b"x\n"
    assert driver.clock.slept == [5, 5]
    assert script.paths()[-1] == "runs/get"


def test_without_a_live_log_the_servers_copy_is_followed_to_the_end(driver: Driver) -> None:
    runs = [reply(run) for run in [*[running()] * 6, done()]]
    script = Script(
        runs__get=list(runs), logs__poll=[page((1, "one\r\n")), page((1, "one\r\n"), (2, "two\r\n"))]
    )
    assert read(driver, Source(), script) == b"one\r\ntwo\r\n"


def test_a_stream_that_is_lost_for_good_continues_from_the_servers_copy(driver: Driver) -> None:
    script = server(*[running()] * 12, done(), polled="one\r\ntwo\r\nthree\r\n")
    assert read(driver, Source([b"one\r\ntw", CUT]), script) == b"one\r\ntwo\r\nthree\r\n"


def test_the_log_ends_when_the_job_ends_while_it_is_unreachable(driver: Driver) -> None:
    script = server(running(), done(), polled="one\r\ntwo\r\n")
    source = Source([b"one\r\n", CUT], [b"never asked for"])
    assert read(driver, source, script) == b"one\r\ntwo\r\n"
    assert len(source.opened) == 1


def test_a_silent_stream_is_closed_once_the_job_has_ended(driver: Driver) -> None:
    script = server(running(), running(), done(), polled="one\r\ntwo\r\n")
    source = Source([b"one\r\n", SILENT, SILENT])
    assert read(driver, source, script) == b"one\r\ntwo\r\n"
    assert source.opened[0].is_closed


def second_attempt(status: str, *, run: str = "running") -> dict[str, Any]:
    body = job("failed", "container_exited_with_error", run=run)
    again = copy.deepcopy(body["jobs"][0]["job_submissions"][0])
    again |= {"id": "sub-1", "submission_num": 1, "status": status, "termination_reason": None}
    body["jobs"][0]["job_submissions"].append(again)
    return body


def of_submission(**texts: str) -> Callable[[dict[str, Any]], Any]:
    return lambda body: page((1, texts[body["job_submission_id"].replace("-", "_")]))


def test_the_next_attempt_of_a_job_is_attached_to(driver: Driver) -> None:
    script = server(
        running(),
        job("failed", "container_exited_with_error"),
        second_attempt("submitted", run="pending"),
        second_attempt("running"),
        second_attempt("done", run="terminating"),
    )
    script.answers["runs/get"][-1] = reply(finished_second())
    source = Source([b"first\r\n", CLOSED], [b"second\r\n", CLOSED])
    assert read(driver, source, script) == b"first\r\nsecond\r\n"
    assert source.submission_id == "sub-1"
    assert "logs/poll" not in script.paths()


def finished_second() -> dict[str, Any]:
    body = second_attempt("done", run="terminating")
    body["jobs"][0]["job_submissions"][-1]["termination_reason"] = "done_by_runner"
    return body


def test_an_unreachable_attempt_is_polled(driver: Driver) -> None:
    script = Script(
        runs__get=[
            reply(second_attempt("running")),
            reply(second_attempt("running")),
            reply(finished_second()),
        ],
        logs__poll=[of_submission(sub_0="first\r\n", sub_1="second\r\n")],
    )
    assert read(driver, Source(moves=False), script) == b"first\r\nsecond\r\n"


def test_earlier_attempts_come_first(driver: Driver) -> None:
    script = Script(
        runs__get=[
            *[reply(second_attempt("running"))] * 3,
            reply(finished_second()),
        ],
        logs__poll=[of_submission(sub_0="first\r\n")],
    )
    source = Source([b"second\r\n", CLOSED], submission_id="sub-1")
    assert read(driver, source, script) == b"first\r\nsecond\r\n"


def test_detaching_ends_the_log(driver: Driver) -> None:
    source = Source()

    def detach(body: dict[str, Any]) -> Any:
        source.is_closed = True
        return reply(running())

    script = Script(runs__get=[reply(running()), detach], logs__poll=[page((1, "what there is\r\n"))])
    assert read(driver, source, script) == b"what there is\r\n"
    assert not source.rests


def test_a_deleted_run_raises_run_not_found(driver: Driver) -> None:
    with pytest.raises(RunNotFoundError):
        read(driver, Source(), Script(runs__get=[MISSING]))


def test_leaving_the_iteration_closes_the_stream(driver: Driver) -> None:
    source = Source([b"one", b"two"])
    flow = live_chunks(Api("http://s", "main"), Progress("train", "id-1"), source, node=0, poll_interval=5)

    class Enough(Exception):
        pass

    class Stop(list[Any]):
        def append(self, item: Any) -> None:
            raise Enough

    with pytest.raises(Enough):
        driver.events(flow, server(running()), Stop())
    assert [stream.is_closed for stream in source.opened] == [True]
