"""Following a run: order, resuming, retries and unknown statuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._flow.steps import Flow
from dstack_core._wire.api import Api
from dstack_core.errors import RunNotFoundError, ServerUnreachableError
from dstack_core.models.events import (
    ContactLost,
    ContactRestored,
    Event,
    LogLines,
    RunFinished,
    StatusChanged,
)
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.statuses import RunStatus
from tests.core.scripted import LOST, MISSING, Driver, Script, page, reply, run_json

API = Api("http://server", "main")


def flow(
    driver: Driver, progress: Progress | None = None, *, logs: bool = True, budget: float = 600
) -> Flow[Outcome]:
    progress = progress or Progress("train", "id-1")
    options = FollowOptions(poll_interval=5, logs=logs, wall_clock=driver.clock)
    return retrying(follow(API, progress, options), RetryBudget(budget, driver.clock), progress)


def short_texts(events: list[Event]) -> list[str]:
    """Return events as short texts."""
    words: list[str] = []
    for event in events:
        if isinstance(event, StatusChanged):
            words.append(str(event.status))
        elif isinstance(event, LogLines):
            words += [f"| {line}" for line in event.lines]
        elif isinstance(event, RunFinished):
            words.append(f"end {event.outcome.status} {event.outcome.exit_status}")
        else:
            words.append(type(event).__name__)
    return words


def statuses(*names: str) -> list[Any]:
    return [reply(run_json(name)) for name in names]


def test_the_last_lines_precede_the_final_status(driver: Driver) -> None:
    script = Script(
        runs__get=statuses("submitted", "provisioning", "running", "done"),
        logs__poll=[page((1, "one\r\ntw")), page((1, "one\r\ntw"), (2, "o\r\n"), (3, "last"))],
    )
    assert short_texts(driver.events(flow(driver), script)) == [
        "submitted", "provisioning", "running", "| one", "| two", "| last", "done", "end done 0",
    ]  # fmt: skip
    assert driver.clock.slept == [5, 5, 5]


def test_a_status_message_is_reported_only_where_it_adds_something(driver: Driver) -> None:
    done = run_json("done") | {"status_message": "exited (0)"}
    script = Script(runs__get=[*statuses("running"), reply(done)], logs__poll=[page()])
    events = driver.events(flow(driver), script)
    assert [event.message for event in events if isinstance(event, StatusChanged)] == [None, "exited (0)"]


def test_logs_are_not_polled_before_the_container_runs(driver: Driver) -> None:
    script = Script(runs__get=statuses("submitted", "provisioning", "done"), logs__poll=[page()])
    driver.events(flow(driver), script)
    assert script.paths() == ["runs/get"] * 3 + ["logs/poll"]


def test_without_logs_only_the_status_is_polled(driver: Driver) -> None:
    script = Script(runs__get=statuses("running", "done"))
    assert short_texts(driver.events(flow(driver, logs=False), script)) == ["running", "done", "end done 0"]


def test_another_process_resumes_after_any_event_with_no_line_lost_or_repeated(driver: Driver) -> None:
    log = [(1, "a\n"), (2, "b\nc"), (2, "c\n"), (2, "d\n"), (3, "e\n"), (4, "f")]

    def poll(body: dict[str, Any]) -> Any:
        since = body.get("start_time")
        fresh = [item for item in log if since is None or f"2026-11-23T09:30:00.{item[0]:03}000" > since[:26]]
        number = int(body.get("next_token") or 0)
        token = str(number + 1) if number + 1 < len(fresh) else None
        return page(*fresh[number : number + 1], next_token=token)

    def script() -> Script:
        return Script(runs__get=statuses("running", "running", "done"), logs__poll=[poll])

    events = driver.events(flow(driver), script())
    whole = short_texts(events)
    assert [word for word in whole if word[0] == "|"] == ["| a", "| b", "| cc", "| d", "| e", "| f"]
    for number, event in enumerate(events[:-1]):
        wire = json.loads(json.dumps(event.progress.to_dict()))
        rest = short_texts(driver.events(flow(driver, Progress.from_dict(wire)), script()))
        lines = [word for word in whole[: number + 1] + rest if word[0] == "|"]
        assert lines == ["| a", "| b", "| cc", "| d", "| e", "| f"], (number, event)


def test_servers_without_page_tokens_are_read_to_the_end(driver: Driver) -> None:
    pages = [
        page((1, "a\n"), (2, "b\n"), tokens=False),
        page((2, "b\n"), (3, "c\n"), tokens=False),
        page((3, "c\n"), tokens=False),
    ]
    script = Script(runs__get=statuses("done"), logs__poll=list(pages))
    assert [w for w in short_texts(driver.events(flow(driver), script)) if w[0] == "|"] == [
        "| a",
        "| b",
        "| c",
    ]
    assert all("next_token" not in body for body in script.bodies("logs/poll"))


def test_every_node_and_every_attempt_is_followed(driver: Driver) -> None:
    run = run_json("running")
    job = run["jobs"][0]
    first = json.loads(json.dumps(job["job_submissions"][0])) | {
        "id": "sub-a",
        "status": "failed",
        "submission_num": 0,
    }
    second = first | {"id": "sub-b", "status": "running", "submission_num": 1}
    node = {
        "job_spec": job["job_spec"] | {"job_num": 1},
        "job_submissions": [first | {"id": "sub-c", "status": "done"}],
    }
    run["jobs"] = [job | {"job_submissions": [first, second]}, node]
    run["latest_job_submission"] = second

    def poll(body: dict[str, Any]) -> Any:
        return page((1, f"from {body['job_submission_id']}\n")) if not body.get("start_time") else page()

    script = Script(runs__get=[reply(run), reply(run), reply(run | {"status": "failed"})], logs__poll=[poll])
    events = driver.events(flow(driver), script)
    found = [event for event in events if isinstance(event, LogLines)]
    assert {(event.nodes, event.replicas) for event in found} == {(2, 1)}
    lines = [(e.lines, e.node, e.attempt) for e in found]
    assert lines == [(("from sub-a",), 0, 0), (("from sub-b",), 0, 1), (("from sub-c",), 1, 0)]
    asked = [body["job_submission_id"] for body in script.bodies("logs/poll")]
    assert asked.count("sub-a") == 1, "a drained log is not polled again"


@pytest.mark.parametrize(
    ("run", "status"),
    [
        ({"status": "pending", "status_message": "pending"}, RunStatus.PENDING),
        ({"status": "terminating", "termination_reason": "stopped_by_user"}, RunStatus.STOPPING),
        ({"status": "terminating", "termination_reason": "aborted_by_user"}, RunStatus.ABORTING),
        ({"status": "terminating", "termination_reason": "job_failed"}, RunStatus.TERMINATING),
        ({"status": "provisioning", "status_message": "pulling"}, RunStatus.DOWNLOADING),
        ({"status": "hibernating", "status_message": "zzz"}, "hibernating"),
    ],
)
def test_statuses_as_documented_and_unknown_ones_as_they_came(
    driver: Driver, run: dict[str, Any], status: str
) -> None:
    script = Script(runs__get=[reply(run_json(run["status"]) | run), *statuses("done")], logs__poll=[page()])
    events = driver.events(flow(driver), script)
    first = events[0]
    assert isinstance(first, StatusChanged)
    assert first.status == status
    assert (first.progress.stopping_since is not None) == (run["status"] == "terminating")


def test_a_lost_connection_is_reported_and_retried(driver: Driver) -> None:
    script = Script(
        runs__get=[reply(run_json("running")), LOST, LOST, LOST, reply(run_json("done"))],
        logs__poll=[page((1, "a\n")), LOST, page((1, "a\n"), (2, "b\n"))],
    )
    events = driver.events(flow(driver), script)
    assert short_texts(events) == [
        "running", "| a", "ContactLost", "ContactLost", "ContactLost", "ContactRestored",
        "ContactLost", "ContactRestored", "| b", "done", "end done 0",
    ]  # fmt: skip
    lost = [event for event in events if isinstance(event, ContactLost)]
    assert 0 < lost[0].gives_up_in <= 600
    assert isinstance(next(e for e in events if isinstance(e, ContactRestored)).progress, Progress)


def test_retries_end_after_the_budget(driver: Driver) -> None:
    script = Script(runs__get=[reply(run_json("running")), LOST], logs__poll=[page()])
    with pytest.raises(ServerUnreachableError, match=r"http://server.*Tried \d+ times"):
        driver.events(flow(driver, budget=600), script)
    assert 550 <= driver.clock.now - 1000 <= 605
    assert "runs/stop" not in script.paths()


def test_retry_after_is_honoured(driver: Driver) -> None:
    busy = reply({"detail": "slow down"}, 429, retry_after="17")
    script = Script(runs__get=[busy, reply(run_json("done"))], logs__poll=[page()])
    driver.events(flow(driver), script)
    assert driver.clock.slept == [17]


def test_a_deleted_run_raises_run_not_found(driver: Driver) -> None:
    script = Script(runs__get=[reply(run_json("running")), MISSING], logs__poll=[page()])
    with pytest.raises(RunNotFoundError, match="no longer in project main"):
        driver.events(flow(driver), script)
    assert script.bodies("runs/get")[-1] == {"id": "id-1"}
