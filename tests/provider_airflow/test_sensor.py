"""Sensors wait for runs that another process started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from airflow_provider_dstack.sensors import DstackRunSensor
from airflow_provider_dstack.status_trigger import DstackStatusTrigger
from dstack_core import Client, RunStatus
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, connection_json, paths, wait_for

WAYS = pytest.mark.parametrize("how", ["poke", "reschedule", "deferrable"])


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


def sensor(how: str = "poke", **options: Any) -> str:
    """Return the source of a sensor called ``wait``."""
    mode = "deferrable=True" if how == "deferrable" else f"mode={how!r}"
    told = "".join(f", {name}={value!r}" for name, value in {"timeout": 60, **options}.items())
    return f"DstackRunSensor(task_id='wait', run_name='elsewhere', poke_interval=0.3, {mode}{told})"


def once_looked_at(server: LocalServer, action: Callable[[], object]) -> threading.Thread:
    """Run ``action`` as soon as the run was polled once more."""
    before = len(paths(server, "/runs/get"))

    def work() -> None:
        wait_for("poll of the run", lambda: len(paths(server, "/runs/get")) > before, 60)
        action()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@WAYS
def test_a_run_that_ends_well_is_waited_for(
    dag_runner: DagRunner, server: LocalServer, client: Client, tmp_path: Path, how: str
) -> None:
    gate = tmp_path / "gate"
    command = f"until [ -e {gate} ]; do sleep 0.1; done"
    run = client.runs.submit({"type": "task", "commands": [command]}, run_name="elsewhere")
    opener = once_looked_at(server, gate.touch)
    ran = dag_runner.run_tasks(sensor(how))
    opener.join()
    assert ran.tasks == {"wait": "success"}
    outcome = run.refresh().outcome()
    assert outcome is not None
    assert ran.values["wait"] == {
        "run_name": "elsewhere",
        "status": "done",
        "url": run.url,
        "outcome": outcome.to_dict(),
    }


@WAYS
def test_a_run_that_fails_fails_the_sensor_at_once(
    dag_runner: DagRunner,
    server: LocalServer,
    client: Client,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    how: str,
) -> None:
    gate = tmp_path / "gate"
    command = f"until [ -e {gate} ]; do sleep 0.1; done; exit 7"
    client.runs.submit({"type": "task", "commands": [command]}, run_name="elsewhere")
    opener = once_looked_at(server, gate.touch)
    ran = dag_runner.run_tasks(sensor(how))
    opener.join()
    output = capfd.readouterr().out
    assert ran.tasks == {"wait": "failed"}
    assert "DstackUserError" in output
    assert "exited with status 7" in output


@WAYS
def test_an_intermediate_status_is_enough_and_the_run_keeps_running(
    dag_runner: DagRunner, server: LocalServer, client: Client, how: str
) -> None:
    run = client.runs.submit({"type": "task", "commands": ["sleep 600"]}, run_name="elsewhere")
    ran = dag_runner.run_tasks(sensor(how, statuses=["running", str(RunStatus.DONE)]))
    assert ran.tasks == {"wait": "success"}
    assert ran.values["wait"]["status"] == "running"
    assert ran.values["wait"]["outcome"] is None
    assert paths(server, "/runs/stop") == []
    run.stop(abort=True)


STUBBORN = {"type": "task", "commands": ["trap '' INT TERM; sleep 600"], "stop_duration": 600}


@WAYS
@pytest.mark.parametrize(("abort", "status"), [(False, "stopping"), (True, "aborting")])
def test_a_run_that_is_being_stopped_reaches_that_status(
    dag_runner: DagRunner, server: LocalServer, client: Client, how: str, abort: bool, status: str
) -> None:
    run = client.runs.submit(STUBBORN, run_name="elsewhere")
    wait_for("running run", lambda: run.status() is RunStatus.RUNNING)
    # Of an aborted run the embedded server shows little more than the end.
    body = {**_raw(server, "elsewhere"), "status": "terminating"}
    body["termination_reason"] = "aborted_by_user" if abort else "stopped_by_user"
    server.faults.add("/runs/get", times=None, status=200, body=body)
    server.faults.add("/runs/list", times=None, status=200, body=[body])
    ran = dag_runner.run_tasks(sensor(how, statuses=[status]))
    server.faults.clear()
    assert ran.tasks == {"wait": "success"}
    assert ran.values["wait"]["status"] == status
    run.stop(abort=True)


@WAYS
def test_a_run_that_is_retried_reaches_restarting(
    dag_runner: DagRunner, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with LocalServer(retry_seconds=600.0) as server, server.client() as client:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        retry = {"on_events": ["error"], "duration": "1h"}
        client.runs.submit({"type": "task", "commands": ["exit 1"], "retry": retry}, run_name="elsewhere")
        ran = dag_runner.run_tasks(sensor(how, statuses=["restarting"]))
        assert ran.tasks == {"wait": "success"}
        assert ran.values["wait"]["status"] == "restarting"


def _raw(server: LocalServer, name: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {server.token}"}
    url = f"{server.url}/api/project/{server.project}/runs/get"
    found: dict[str, Any] = requests.post(url, json={"run_name": name}, headers=headers, timeout=30).json()
    return found


@WAYS
def test_a_run_that_appears_later_is_waited_for(
    dag_runner: DagRunner, server: LocalServer, client: Client, how: str
) -> None:
    def appear() -> None:
        client.runs.submit({"type": "task", "commands": ["true"]}, run_name="elsewhere")

    starter = once_looked_at(server, appear)
    ran = dag_runner.run_tasks(sensor(how))
    starter.join()
    assert ran.tasks == {"wait": "success"}


def test_a_run_need_not_be_waited_for(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(sensor(wait_for_run=False))
    assert ran.tasks == {"wait": "failed"}
    assert "expected a run of project main, got 'elsewhere'" in capfd.readouterr().out


@pytest.mark.parametrize("how", ["poke", "deferrable"])
@pytest.mark.parametrize(("options", "state"), [({}, "failed"), ({"soft_fail": True}, "skipped")])
def test_a_run_that_ended_otherwise_fails_or_skips_the_sensor(
    dag_runner: DagRunner,
    server: LocalServer,
    client: Client,
    capfd: pytest.CaptureFixture[str],
    how: str,
    options: dict[str, Any],
    state: str,
) -> None:
    run = client.runs.submit({"type": "task", "commands": ["true"]}, run_name="elsewhere")
    run.wait(30, poll_interval=0.1)
    ran = dag_runner.run_tasks(sensor(how, statuses="failed", **options))
    assert ran.tasks == {"wait": state}
    assert "ended as done and was not seen as failed. Add 'done' to statuses" in capfd.readouterr().out


@pytest.mark.parametrize(("conn", "told"), [("bad_token", "token"), ("bad_project", "nowhere")])
def test_a_wrong_connection_fails_at_once(
    dag_runner: DagRunner,
    wrong_connections: LocalServer,
    capfd: pytest.CaptureFixture[str],
    conn: str,
    told: str,
) -> None:
    ran = dag_runner.run_tasks(sensor(dstack_conn_id=conn, retries=2))
    output = capfd.readouterr().out
    assert ran.tasks == {"wait": "failed"}
    assert "AirflowFailException" in output
    assert told in output


def test_a_sensor_keeps_polling_a_server_that_does_not_answer(
    dag_runner: DagRunner, wrong_connections: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(sensor(dstack_conn_id="bad_url", timeout=1))
    output = capfd.readouterr().out
    assert ran.tasks == {"wait": "failed"}
    assert "Polling again." in output
    assert "AirflowSensorTimeout" in output


def test_the_trigger_can_be_made_again_and_holds_no_secret(server: LocalServer) -> None:
    trigger = DstackStatusTrigger(
        dstack_conn_id="dstack_default",
        project_name=None,
        run_name="elsewhere",
        statuses=["done"],
        poll_interval=0.1,
        wait_for_run=False,
    )
    path, arguments = trigger.serialize()
    assert path == f"{DstackStatusTrigger.__module__}.DstackStatusTrigger"
    assert DstackStatusTrigger(**arguments).serialize() == (path, arguments)
    assert server.token not in repr(arguments)

    async def first_event() -> Any:
        return [event async for event in trigger.run()]

    (event,) = asyncio.run(first_event())
    assert event.payload["error"] == "AirflowFailException"
    assert "expected a run of project main, got 'elsewhere'" in event.payload["message"]


def test_the_trigger_tolerates_an_unreachable_server(server: LocalServer, client: Client) -> None:
    client.runs.submit({"type": "task", "commands": ["true"]}, run_name="elsewhere")
    server.faults.add("/runs/get", times=3, drop="before")
    trigger = DstackStatusTrigger(
        dstack_conn_id="dstack_default",
        project_name=None,
        run_name="elsewhere",
        statuses=["done"],
        poll_interval=0.1,
    )

    async def first_event() -> Any:
        return [event async for event in trigger.run()]

    (event,) = asyncio.run(first_event())
    assert event.payload["sight"]["status"] == "done"


def test_an_empty_list_of_statuses_is_refused_when_the_dag_is_parsed() -> None:
    with pytest.raises(ValueError, match="statuses: expected one status or more"):
        DstackRunSensor(task_id="wait", run_name="elsewhere", statuses=[])
