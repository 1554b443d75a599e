"""Polled logs: raw bytes labelled with their job, and whole lines where a run has several jobs."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest

from dstack_core import LogBytes, errors
from dstack_core._flow.raw_log import ChunkOptions, LogChunk
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from tests.core.scripted import LOST, MISSING, Answer, Driver, Script, page, reply, run_json

API = Api("http://server", "main")
NOTHING = page()


def nodes(status: str, count: int = 2) -> dict[str, Any]:
    """Return a run of several nodes; the log of node N has the key ``sub-N``."""
    body = run_json(status)
    jobs = [copy.deepcopy(body["jobs"][0]) for _ in range(count)]
    for number, job in enumerate(jobs):
        job["job_spec"]["job_num"] = number
        job["job_submissions"][-1]["id"] = f"sub-{number}"
    return body | {"jobs": jobs}


class Logs:
    """A server that answers ``logs/poll`` from a list of pages for each job submission, then with empty pages."""

    def __init__(self, **pages: list[Any]) -> None:
        self.pages = {key.replace("_", "-"): list(items) for key, items in pages.items()}

    def __call__(self, body: dict[str, Any]) -> Any:
        items = self.pages[body["job_submission_id"]]
        return items.pop(0) if items else NOTHING


def read(driver: Driver, runs: list[Answer], logs: Any, **options: Any) -> list[LogBytes]:
    script = Script(runs__get=runs, logs__poll=[logs])
    flow = Operations(API, 30.0, clock=driver.clock).chunks("train", "id-1", ChunkOptions(**options))
    return [event.data for event in driver.events(flow, script) if isinstance(event, LogChunk)]


def test_chunks_of_one_job_are_as_the_runner_wrote_them(driver: Driver) -> None:
    logs = Logs(sub_0=[page((1, "a\r\nb"), (2, "c"))])
    chunks = read(driver, [reply(run_json("done"))], logs)
    assert chunks == [b"a\r\nbc"]
    (chunk,) = chunks
    assert (chunk.node, chunk.replica, chunk.attempt, chunk.submission_id) == (0, 0, 0, "sub-0")
    assert chunk.timestamp == datetime(2026, 11, 23, 9, 30, 0, 2000, tzinfo=UTC)


def test_lines_of_several_nodes_are_whole_and_know_their_node(driver: Driver) -> None:
    running, done = reply(nodes("running")), reply(nodes("done"))
    logs = Logs(
        sub_0=[page((1, "zero 1\r\nze")), page((3, "ro 2\r\nlast of zero"))],
        sub_1=[page((2, "one")), page((4, " 1\r\n"))],
    )
    chunks = read(driver, [running, done], logs, follow=True)
    assert [(chunk.node, bytes(chunk)) for chunk in chunks] == [
        (0, b"zero 1\r\n"),
        (0, b"zero 2\r\n"),
        (0, b"last of zero\r\n"),
        (1, b"one 1\r\n"),
    ]
    assert [chunk.submission_id for chunk in chunks] == ["sub-0", "sub-0", "sub-0", "sub-1"]


def test_without_follow_an_unfinished_line_is_ended(driver: Driver) -> None:
    logs = Logs(sub_0=[page((1, "zero, not ended"))], sub_1=[page((2, "one"))])
    chunks = read(driver, [reply(nodes("running"))], logs)
    assert b"".join(chunks) == b"zero, not ended\r\none\r\n"


def test_an_unfinished_line_that_only_grows_is_not_kept_forever(driver: Driver) -> None:
    bar = "\r" + "#" * 70_000
    logs = Logs(sub_0=[page((1, bar))], sub_1=[])
    chunks = read(driver, [reply(nodes("running")), reply(nodes("done"))], logs, follow=True)
    assert chunks == [bar.encode()]


def test_a_single_node_can_be_read_and_is_raw(driver: Driver) -> None:
    logs = Logs(sub_1=[page((2, "one, not ended"))])
    assert read(driver, [reply(nodes("running"))], logs, node=1) == [b"one, not ended"]
    with pytest.raises(
        errors.ConfigurationError, match=r"node: expected a node of run train \(0, 1\), got 5"
    ):
        read(driver, [reply(nodes("running"))], logs, node=5)


def test_every_attempt_of_a_retried_job_is_read_in_order(driver: Driver) -> None:
    body = run_json("done")
    first = copy.deepcopy(body["jobs"][0]["job_submissions"][0]) | {"id": "sub-first", "status": "failed"}
    second = first | {"id": "sub-second", "submission_num": 1, "status": "done"}
    body["jobs"][0]["job_submissions"] = [first, second]
    logs = Logs(sub_first=[page((1, "try 0\r\n"))], sub_second=[page((2, "try 1\r\n"))])
    chunks = read(driver, [reply(body)], logs)
    assert [(chunk.attempt, bytes(chunk)) for chunk in chunks] == [(0, b"try 0\r\n"), (1, b"try 1\r\n")]


def test_follow_reads_until_the_run_has_ended_across_a_lost_reply(driver: Driver) -> None:
    logs: list[Answer] = [page((1, "a\r\n")), LOST, page((2, "b\r\n")), NOTHING]
    script = Script(runs__get=[reply(run_json()), reply(run_json("done"))], logs__poll=logs)
    flow = Operations(API, 30.0, clock=driver.clock).chunks(
        "train", "id-1", ChunkOptions(follow=True, poll_interval=3.0)
    )
    events = driver.events(flow, script)
    assert [event.data for event in events if isinstance(event, LogChunk)] == [b"a\r\n", b"b\r\n"]
    assert driver.clock.slept[0] == 3.0


@pytest.mark.parametrize("diagnose", [False, True])
def test_diagnose_reads_the_runners_own_log(driver: Driver, diagnose: bool) -> None:
    script = Script(runs__get=[reply(run_json("done"))], logs__poll=[NOTHING])
    flow = Operations(API, 30.0, clock=driver.clock).chunks("train", "id-1", ChunkOptions(diagnose=diagnose))
    driver.events(flow, script)
    assert [body.get("diagnose") for body in script.bodies("logs/poll")] == [True if diagnose else None]


def test_start_time_is_sent_in_utc_and_a_naive_one_is_local(driver: Driver) -> None:
    local = datetime(2026, 11, 23, 9, 30)
    for moment in (local, local.astimezone()):
        script = Script(runs__get=[reply(run_json("done"))], logs__poll=[NOTHING])
        flow = Operations(API, 30.0, clock=driver.clock).chunks("train", "id-1", ChunkOptions(moment))
        driver.events(flow, script)
        (body,) = script.bodies("logs/poll")
        sent = datetime.fromisoformat(body["start_time"])
        assert (local.astimezone() - sent).total_seconds() == pytest.approx(1e-6), (
            "the server's start time is exclusive"
        )


def test_a_deleted_run_raises_run_not_found(driver: Driver) -> None:
    with pytest.raises(errors.RunNotFoundError, match="no longer in project main"):
        read(driver, [MISSING], Logs())


def test_log_bytes_are_bytes_and_survive_another_process() -> None:
    log = LogBytes(b"line\r\n", node=1, replica=2, attempt=3, submission_id="s", timestamp=datetime.now(UTC))
    copied = pickle.loads(pickle.dumps(log))  # noqa: S301 - our own
    assert (copied, vars(copied)) == (b"line\r\n", vars(log))
    assert isinstance(log, bytes)
    assert b"".join([log, log]) == b"line\r\nline\r\n"
