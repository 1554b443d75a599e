"""The reaper: which runs it stops, which it leaves, and what it reports."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from airflow_provider_dstack._compat import TaskFacts
from airflow_provider_dstack._names import MarkedTask, birth_of
from airflow_provider_dstack._reap import Finding, ReapOptions, failure, reap, summary
from airflow_provider_dstack.errors import DstackError
from dstack_core import Client, Run, ServerUnreachableError, integration
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for

LOG = logging.getLogger("test_reaper")
STARTED = datetime(2026, 11, 23, 12, tzinfo=UTC)
BORN = birth_of(STARTED)
LONG = {"type": "task", "commands": ["sleep 600"]}
SERVICE = {"type": "service", "port": 8417, "commands": ["sleep 600"]}
LONG_AGO = timedelta(hours=1)
_NUMBERS = itertools.count(1)


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


def submit(client: Client, marker: str, configuration: Any = LONG) -> Run:
    return client.runs.submit(configuration, run_name=f"run-{next(_NUMBERS)}", marker=marker)


def train(born: str = BORN, end: str = "") -> str:
    return f"airflow:etl/scheduled__1/train/1of1#{born}{end}"


def facts(
    state: str,
    *,
    ended: timedelta | None = LONG_AGO,
    dag_run_state: str = "failed",
    started: datetime | None = STARTED,
) -> TaskFacts:
    return TaskFacts(state, None if ended is None else datetime.now(UTC) - ended, dag_run_state, started)


def answer(found: TaskFacts | None) -> Callable[[MarkedTask], TaskFacts | None]:
    return lambda task: found


def never(seconds: float) -> None:
    raise AssertionError("nothing is to be waited for")


def one(client: Client, found: TaskFacts | None, **options: Any) -> Finding:
    (finding,) = reap(client, answer(found), ReapOptions(**options), log=LOG, pause=never)
    return finding


def is_stopped(run: Run) -> bool:
    return run.refresh().outcome() is not None or run.raw_status == "terminating"


@pytest.mark.parametrize("state", ["success", "failed", "skipped", "upstream_failed", "removed"])
def test_the_run_of_a_task_that_has_ended_is_stopped(client: Client, state: str) -> None:
    left = submit(client, train())
    finding = one(client, facts(state))
    assert finding == Finding(
        left.name, left.url, "etl/scheduled__1/train", 1, state, "stopped", "its task has ended"
    )
    assert is_stopped(left)


@pytest.mark.parametrize(
    "state",
    [
        "running",
        "deferred",
        "queued",
        "scheduled",
        "restarting",
        "up_for_retry",
        "up_for_reschedule",
        "no_status",
    ],
)
def test_the_run_of_a_task_that_has_not_ended_is_left(
    client: Client, server: LocalServer, state: str
) -> None:
    # The marker is that of an earlier try, whose run a durable retry takes over.
    submit(client, train())
    # Even if it cannot be proven to be this Airflow's: clearing gives a DAG run another start.
    for started in (STARTED, None):
        finding = one(client, facts(state, started=started), stop_unknown=True, stop_services=True, min_age=0)
        assert (finding.action, finding.reason) == ("left", "its task has not ended")
    assert paths(server, "/runs/stop") == []


@pytest.mark.parametrize(
    ("found", "state", "reason"),
    [
        (None, "unknown", "has no such task instance"),
        (facts("failed", started=STARTED + timedelta(seconds=1)), "failed", "has another start"),
        (facts("failed", started=None), "failed", "has another start"),
    ],
    ids=["deleted", "another Airflow's, or cleared", "not started yet"],
)
def test_a_run_of_unknown_ownership_is_left_unless_requested(
    client: Client, found: TaskFacts | None, state: str, reason: str
) -> None:
    run = submit(client, train())
    left = one(client, found, min_age=0)
    assert (left.action, left.state) == ("left", state)
    assert reason in left.reason
    assert not is_stopped(run)
    stopped = one(client, found, min_age=0, stop_unknown=True)
    assert stopped.action == "stopped"
    assert reason in stopped.reason
    assert is_stopped(run)


@pytest.mark.parametrize("found", [facts("failed"), None], ids=["failed", "unknown"])
def test_a_run_that_is_to_be_kept_is_always_left(
    client: Client, server: LocalServer, found: TaskFacts | None
) -> None:
    submit(client, train(end="/keep"))
    finding = one(client, found, stop_unknown=True, stop_services=True, min_age=0)
    assert (finding.action, finding.reason) == ("left", 'it was submitted with on_kill_action="keep"')
    assert paths(server, "/runs/stop") == []


@pytest.mark.parametrize(
    ("found", "options", "action"),
    [
        (facts("success"), {}, "left"),
        (facts("success", dag_run_state="success"), {}, "left"),
        (facts("success", dag_run_state="running"), {"stop_services": True}, "left"),
        (facts("success", dag_run_state="success"), {"stop_services": True}, "stopped"),
        (facts("failed", dag_run_state="running"), {}, "stopped"),
        (None, {"stop_unknown": True}, "left"),
        (None, {"stop_unknown": True, "stop_services": True, "min_age": 0}, "stopped"),
    ],
    ids=[
        "its task succeeded",
        "its DAG run ended too",
        "its DAG run goes on",
        "told to",
        "its task failed",
        "unknown",
        "unknown, told to",
    ],
)
def test_a_service_outlives_a_task_that_succeeded(
    client: Client, found: TaskFacts | None, options: dict[str, Any], action: str
) -> None:
    run = submit(client, train(), SERVICE)
    assert one(client, found, **options).action == action
    assert is_stopped(run) is (action == "stopped")


def test_a_task_that_just_ended_has_time_to_stop_its_run_itself(client: Client) -> None:
    run = submit(client, train())
    finding = one(client, facts("failed", ended=timedelta(seconds=20)))
    assert finding.action == "left"
    assert finding.reason.startswith("its task ended 2")
    assert not is_stopped(run)
    assert one(client, facts("failed", ended=timedelta(seconds=20)), min_age=10).action == "stopped"


def test_a_run_of_unknown_ownership_is_as_old_as_itself(client: Client) -> None:
    submit(client, train())
    assert one(client, None, stop_unknown=True).action == "left"


def test_without_the_time_of_the_end_a_run_must_be_found_twice(client: Client) -> None:
    stays, just_ended, taken_up, ends_itself, runs = (
        submit(client, f"airflow:etl/r/{name}/1of1#{BORN}") for name in ("a", "b", "c", "d", "e")
    )
    kept = submit(client, f"airflow:etl/r/f/1of1#{BORN}/keep")
    states = {"a": "failed", "b": "running", "c": "failed", "d": "success", "e": "running", "f": "failed"}
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        states.update(b="failed", c="restarting")
        ends_itself.stop()

    found = reap(
        client,
        lambda task: facts(states[task.task_id], ended=None),
        ReapOptions(min_age=33.0),
        log=LOG,
        pause=pause,
    )
    assert pauses == [33.0]
    assert {finding.run_name: (finding.action, finding.reason) for finding in found} == {
        stays.name: ("stopped", "its task has ended"),
        just_ended.name: ("left", "its task just ended"),
        taken_up.name: ("left", "its task has not ended"),
        runs.name: ("left", "its task has not ended"),
        kept.name: ("left", 'it was submitted with on_kill_action="keep"'),
    }
    assert is_stopped(stays)
    assert not is_stopped(just_ended)
    assert not is_stopped(taken_up)


def test_there_is_no_second_check_where_nothing_has_ended(client: Client) -> None:
    submit(client, train())
    assert one(client, facts("running", ended=None)).action == "left"
    assert one(client, facts("success", ended=None), min_age=0, dry_run=True).action == "would stop"


def test_a_dry_run_stops_nothing(client: Client, server: LocalServer) -> None:
    submit(client, train())
    assert one(client, facts("failed"), dry_run=True).action == "would stop"
    assert paths(server, "/runs/stop") == []


@pytest.mark.parametrize(
    "marker",
    [
        "mine.yml",
        "prefect:flow_run/1/stop/abc-0/1",
        "airflow:etl/r/train",
        f"airflow:etl/r/train/xof1#{BORN}",
    ],
)
def test_runs_of_other_programs_are_ignored(client: Client, server: LocalServer, marker: str) -> None:
    submit(client, marker)
    assert reap(client, lambda task: pytest.fail("asked"), ReapOptions(stop_unknown=True), log=LOG) == []
    assert paths(server, "/runs/stop") == []


def test_a_run_that_is_stopping_already_is_left_out(client: Client) -> None:
    ignores = {"type": "task", "commands": ["trap '' INT TERM; sleep 600"]}
    run = submit(client, train(), ignores)
    wait_for("running run", lambda: run.refresh().raw_status == "running")
    run.stop()
    assert reap(client, answer(facts("failed")), ReapOptions(), log=LOG) == []


def test_a_run_that_cannot_be_stopped_does_not_affect_the_others(client: Client, server: LocalServer) -> None:
    left = {run.name: run for run in (submit(client, train()), submit(client, train()))}
    server.faults.add("/runs/stop", status=403)
    found = reap(client, answer(facts("failed")), ReapOptions(), log=LOG)
    actions = {finding.action: left[finding.run_name] for finding in found}
    assert actions.keys() == {"not stopped", "stopped"}
    refused, stopped = actions["not stopped"], actions["stopped"]
    assert is_stopped(stopped)
    problem = failure(found)
    assert problem is not None
    assert refused.name in problem
    assert refused.url in problem
    assert stopped.name not in problem


def test_several_runs_are_stopped_at_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [submit(client, train()) for _ in range(3)]
    stop_run, together = integration.stop_run, threading.Barrier(3)

    def stop_with_others(*args: Any, **options: Any) -> Any:
        together.wait(timeout=60)
        return stop_run(*args, **options)

    monkeypatch.setattr(integration, "stop_run", stop_with_others)
    found = reap(client, answer(facts("failed")), ReapOptions(), log=LOG, pause=never)
    assert [one.run_name for one in found] == [run.name for run in reversed(left)]
    assert all(is_stopped(run) for run in left)


def test_a_stop_that_the_server_drops_is_reported(
    client: Client, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dstack._reap.stop_seconds", lambda client: 2.0)
    run = submit(client, train())
    server.faults.add("/runs/stop", times=None, status=200, body="null")
    assert one(client, facts("failed")).action == "not stopped"
    assert not is_stopped(run)


def test_an_airflow_that_does_not_answer_stops_nothing(client: Client, server: LocalServer) -> None:
    submit(client, train())
    asked = itertools.count()

    def ask(task: MarkedTask) -> TaskFacts:
        if next(asked) == 1:
            raise OSError("connection refused")
        return facts("failed")

    submit(client, train())
    with pytest.raises(DstackError, match=r"etl/scheduled__1/train, got OSError: connection refused. No run"):
        reap(client, ask, ReapOptions(), log=LOG)
    assert paths(server, "/runs/stop") == []


def test_a_dstack_server_that_does_not_answer_is_one_error(server: LocalServer) -> None:
    with server.client() as client:
        submit(client, train())
    server.faults.add("/runs/list", times=None, status=503)
    with (
        Client(
            server_url=server.url, project_name=server.project, user_token=server.token, retry_budget=0.5
        ) as client,
        pytest.raises(ServerUnreachableError),
    ):
        reap(client, lambda task: pytest.fail("asked"), ReapOptions(), log=LOG)


def test_each_run_is_one_line_with_its_page(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    run = submit(client, train())
    with caplog.at_level(logging.INFO, LOG.name):
        found = reap(client, answer(facts("failed")), ReapOptions(dry_run=True), log=LOG)
    assert caplog.messages == [
        f"Would stop: run {run.name} ({run.url}) of etl/scheduled__1/train, try 1 (failed): its task has ended"
    ]
    assert summary(found, "main") == "1 active run of Airflow tasks in project main: 1 would be stopped."
    assert summary([], "main") == "No active run of an Airflow task was found in project main."


def test_a_marker_names_its_task_instance() -> None:
    marker = "airflow:my.dag/scheduled__2026-11-23T00:00:00+00:00/group.train[3]/2of4#5f1c9a"
    read = MarkedTask.read(marker)
    assert read == MarkedTask(
        "my.dag", "scheduled__2026-11-23T00:00:00+00:00", "group.train", 3, 2, "5f1c9a", False
    )
    assert str(read) == "my.dag/scheduled__2026-11-23T00:00:00+00:00/group.train[3]"
    slashed = MarkedTask.read("airflow:d/a/b/t/1of1#5f1c9a/keep")
    assert slashed == MarkedTask("d", "a/b", "t", None, 1, "5f1c9a", True)
    assert MarkedTask.read(None) is None
