"""Flows against a real Prefect server and an embedded dstack server."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, unmapped

from dstack_core import RunFailedError, RunNameTakenError, RunStatus, Service, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, run_task

from .support import all_runs, is_running, outcome_of, submissions, the_run, until
from .ways import FAST, THREE_LINES, WAYS, Runner, async_direct, sync_direct

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.mark.parametrize("run", WAYS)
def test_the_outcome_is_returned(run: Runner, dstack: LocalServer, credentials: DstackCredentials) -> None:
    outcome = run(THREE_LINES, credentials, **FAST)
    assert outcome["status"] == "done"
    assert outcome["exit_status"] == 0
    assert outcome == json.loads(json.dumps(outcome)) == outcome_of(the_run(dstack)).to_dict()
    assert dstack.token not in json.dumps(outcome)


@pytest.mark.parametrize("run", WAYS)
def test_a_failed_run_fails_the_task_with_its_last_lines(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(RunFailedError) as caught:
        run(Task(commands=["echo out of memory", "exit 7"]), credentials, **FAST)
    assert "exited with status 7" in str(caught.value)
    # The log has them, and Prefect logs the message of an error several times.
    assert caught.value.last_lines == ("out of memory",)
    assert "out of memory" not in str(caught.value)
    assert caught.value.outcome.exit_status == 7
    assert submissions(dstack) == 1


def test_mapped_tasks_have_runs_of_their_own(dstack: LocalServer, credentials: DstackCredentials) -> None:
    commands: list[Any] = [{"type": "task", "commands": [f"echo {word}"]} for word in ("a", "a", "b")]

    @flow
    def mapped() -> list[dict[str, Any]]:
        return list(run_task.map(commands, credentials=unmapped(credentials), **FAST).result())

    outcomes = mapped()
    assert [outcome["status"] for outcome in outcomes] == ["done"] * 3
    assert len({outcome["run_name"] for outcome in outcomes}) == 3
    assert len(all_runs(dstack)) == 3


def test_the_environment_and_a_file_are_enough(
    dstack: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SERVER_URL", dstack.url), ("PROJECT", dstack.project), ("TOKEN", dstack.token)):
        monkeypatch.setenv(f"DSTACK_{name}", value)
    path = tmp_path / "train.dstack.yml"
    path.write_text("type: task\nname: train\ncommands:\n  - echo hi\n")
    assert sync_direct(str(path), **FAST)["run_name"].split("-")[-2] == "train"
    assert async_direct(path, **FAST)["status"] == "done"


def test_a_local_port_that_is_taken_on_the_worker_does_not_matter(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        task = Task(commands=["true"], ports=[held.getsockname()[1]])
        assert run_task(task, credentials, **FAST)["status"] == "done"


def test_outside_a_flow_a_task_works_too(dstack: LocalServer, credentials: DstackCredentials) -> None:
    assert run_task(THREE_LINES, credentials, **FAST)["status"] == "done"
    assert run_task(THREE_LINES, credentials, **FAST)["status"] == "done"
    assert len(all_runs(dstack)) == 2


def test_a_callers_name_is_used_and_another_owners_run_is_left_alone(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    assert sync_direct(THREE_LINES, credentials, run_name="train", **FAST)["run_name"] == "train"
    with dstack.client() as client:
        other = client.runs.submit(Task(commands=["sleep 60"]), run_name="busy")
        with pytest.raises(RunNameTakenError, match="busy"):
            sync_direct(THREE_LINES, credentials, run_name="busy", **FAST)
        assert other.status() is not RunStatus.TERMINATED
        other.stop()


def test_submitted_tasks_may_finish_when_their_flow_returns(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def returning() -> str:
        run_task.submit(Task(commands=["sleep 3"]), credentials, **FAST)
        until(lambda: all_runs(dstack))
        return "early"

    assert returning() == "early"
    assert outcome_of(the_run(dstack)).status is RunStatus.DONE


def test_a_service_runs_until_it_is_stopped(dstack: LocalServer, credentials: DstackCredentials) -> None:
    def stop() -> None:
        until(lambda: is_running(dstack))
        the_run(dstack).stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Exception, match="was stopped on request"):
        sync_direct(Service(commands=["sleep 60"], port=8000), credentials, **FAST)
    stopper.join()
