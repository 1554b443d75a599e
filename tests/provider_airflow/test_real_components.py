"""The provider in a real Airflow: api-server, scheduler, dag-processor and triggerer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import paths, runs_of, wait_for
from tests.provider_airflow.versions import needs_3_2

pytestmark = pytest.mark.slow

# Airflow notices a change of state with the next heartbeat, every 5 s; the rest is for a busy machine.
_STOP_SECONDS = 30.0
_CHATTY = "while true; do echo still going; sleep 0.01; done"


def running_run(server: LocalServer, dag_id: str, run_id: str) -> Run:
    def look() -> Run | None:
        found = runs_of(server, f"airflow:{dag_id}/{run_id}/")
        return found[0] if found and found[0].raw_status == "running" else None

    return wait_for(f"running run of {dag_id}", look)


def seconds_until_over(run: Run) -> float:
    started = time.monotonic()
    wait_for(f"end of run {run.name}", lambda: run.refresh().outcome(), _STOP_SECONDS)
    return time.monotonic() - started


@pytest.mark.parametrize("state", ["failed", "success"])
def test_a_running_task_that_is_marked_stops_its_run(
    components: Components,
    shared_server: LocalServer,
    state: str,
    record_property: Callable[[str, object], None],
) -> None:
    dag_run = components.trigger("sync", command=_CHATTY)
    run = running_run(shared_server, "sync", dag_run)
    components.set_state("sync", dag_run, state)
    seconds = seconds_until_over(run)
    record_property("seconds_to_stop", round(seconds, 1))
    assert run.raw_status == "terminated"
    assert components.task("sync", dag_run)["state"] == state


def test_a_cleared_running_task_stops_its_run_and_starts_another(
    components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    dag_run = components.trigger("sync", command=f"until [ -e {gate} ]; do sleep 0.1; done")
    first = running_run(shared_server, "sync", dag_run)
    components.clear("sync", dag_run)
    seconds_until_over(first)
    assert first.raw_status == "terminated"

    def second() -> Run | None:
        newest = runs_of(shared_server, f"airflow:sync/{dag_run}/")[0]
        return newest if newest.id != first.id else None

    run = wait_for("run of the second try", second)
    gate.touch()
    components.wait_for_state("sync", dag_run, "success")
    assert run.name != first.name
    assert run.refresh().raw_status == "done"


def test_a_killed_task_that_keeps_its_run_leaves_it_alone(
    components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    dag_run = components.trigger("sync_keep", command=f"until [ -e {gate} ]; do sleep 0.1; done")
    run = running_run(shared_server, "sync_keep", dag_run)
    components.set_state("sync_keep", dag_run, "failed")
    wait_for(
        "word about the kept run",
        lambda: "keeps running: on_kill_action is 'keep'" in str(components.log("sync_keep", dag_run)),
    )
    assert run.refresh().raw_status == "running"
    gate.touch()
    seconds_until_over(run)
    assert run.raw_status == "done"


@pytest.mark.parametrize("state", ["failed", "success"])
def test_a_deferred_task_that_is_marked_stops_its_run(
    components: Components,
    shared_server: LocalServer,
    state: str,
    record_property: Callable[[str, object], None],
) -> None:
    dag_run = components.trigger("deferred", command="sleep 600")
    run = running_run(shared_server, "deferred", dag_run)
    components.wait_for_state("deferred", dag_run, "deferred")
    # Until the triggerer has the trigger, there is no process to notify.
    polls = len(paths(shared_server, "/runs/get"))
    wait_for("polls by the trigger", lambda: len(paths(shared_server, "/runs/get")) > polls + 2)
    components.set_state("deferred", dag_run, state)
    seconds = seconds_until_over(run)
    record_property("seconds_to_stop", round(seconds, 1))
    assert run.raw_status == "terminated"
    assert components.task("deferred", dag_run)["state"] == state


def test_a_deferred_run_has_each_line_once_in_the_task_log(
    components: Components, shared_server: LocalServer
) -> None:
    command = "for i in $(seq -w 1 40); do echo step-$i; sleep 0.3; done"
    dag_run = components.trigger("deferred", command=command)
    components.wait_for_state("deferred", dag_run, "deferred")
    components.wait_for_state("deferred", dag_run, "success", "failed")
    steps = [line for line in components.log_lines("deferred", dag_run) if line.startswith("step-")]
    assert steps == [f"step-{number:02}" for number in range(1, 41)]
    assert components.result("deferred", dag_run)["status"] == "done"


def test_a_restarted_triggerer_neither_stops_nor_doubles_a_run(
    components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    dag_run = components.trigger("deferred", command=f"until [ -e {gate} ]; do sleep 0.1; done; echo opened")
    run = running_run(shared_server, "deferred", dag_run)
    components.wait_for_state("deferred", dag_run, "deferred")
    stops = len(paths(shared_server, "/runs/stop"))
    components.end_one("triggerer")
    components.start_one("triggerer")
    polls = len(paths(shared_server, "/runs/get"))
    wait_for("polls by the new triggerer", lambda: len(paths(shared_server, "/runs/get")) > polls + 2)
    assert run.refresh().raw_status == "running"
    gate.touch()
    components.wait_for_state("deferred", dag_run, "success")
    assert len(paths(shared_server, "/runs/stop")) == stops
    assert len(runs_of(shared_server, f"airflow:deferred/{dag_run}/")) == 1
    assert "opened" in components.log_lines("deferred", dag_run)


def test_execution_timeout_holds_while_a_task_is_deferred(
    components: Components, shared_server: LocalServer
) -> None:
    dag_run = components.trigger("deferred_timeout", command="sleep 600")
    run = running_run(shared_server, "deferred_timeout", dag_run)
    components.wait_for_state("deferred_timeout", dag_run, "failed")
    seconds_until_over(run)
    assert run.raw_status == "terminated"
    assert any("execution_timeout" in line for line in components.log_lines("deferred_timeout", dag_run))


def test_values_of_env_are_hidden_in_the_worker_log(components: Components) -> None:
    dag_run = components.trigger("sync", command="echo the word is $MAGIC_TOKEN")
    components.wait_for_state("sync", dag_run, "success")
    lines = components.log_lines("sync", dag_run)
    assert "the word is ***" in lines
    assert not any("open-sesame" in line for line in lines)
    path = f"/api/v2/dags/sync/dagRuns/{dag_run}/taskInstances/train"
    assert "open-sesame" not in str(components.call("GET", path))


def test_mapped_tasks_have_a_run_each(components: Components, shared_server: LocalServer) -> None:
    dag_run = components.trigger("mapped")
    components.wait_for_run_end("mapped", dag_run)
    runs = runs_of(shared_server, f"airflow:mapped/{dag_run}/")
    assert sorted((run.marker or "").split("/")[2] for run in runs) == ["train[0]", "train[1]"]
    assert {run.raw_status for run in runs} == {"done"}


@needs_3_2
def test_the_connection_form_shows_the_fields(components: Components) -> None:
    forms = components.call("GET", "/ui/connections/hook_meta")
    form = next(form for form in forms if form["connection_type"] == "dstack")
    assert form["standard_fields"]["host"]["title"] == "Server URL"
    assert form["standard_fields"]["password"]["title"] == "Token"
    assert {"project", "verify", "ca_bundle", "timeout"} <= set(form["extra_fields"])


def test_the_test_button_distinguishes_right_from_wrong_connections(
    components: Components, shared_server: LocalServer
) -> None:
    def press(**changes: str) -> tuple[bool, str]:
        body = {
            "connection_id": "pressed",
            "conn_type": "dstack",
            "host": shared_server.url,
            "login": shared_server.project,
            "password": shared_server.token,
            **changes,
        }
        answer = components.call("POST", "/api/v2/connections/test", body)
        return answer["status"], answer["message"]

    assert press() == (True, f"Connected to project main on {shared_server.url}")
    for changes, told in [
        ({"password": "not-the-token"}, "Wrong token"),
        ({"login": "nowhere"}, "No such project"),
        ({"host": "http://127.0.0.1:9"}, "Wrong server URL"),
    ]:
        good, message = press(**changes)
        assert not good
        assert message.startswith(told)
        assert "not-the-token" not in message
