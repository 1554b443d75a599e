"""A stop that the server takes and undoes, and one that it never needed."""

from __future__ import annotations

import logging
import threading

import pytest

from airflow_provider_dstack import _build, _stop
from airflow_provider_dstack._stop import stop_patiently
from airflow_provider_dstack.errors import DstackRunInterrupted
from airflow_provider_dstack.hooks import DstackHook
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.health_server import HEALTHY, PUBLIC, health_server
from tests.provider_airflow.support import over, paths, wait_for
from tests.provider_airflow.test_job import job_of, kill_client, killed_when, run_of, wait_until_over
from tests.provider_airflow.test_operator import CONTEXT, RUN

_STUBBORN = "trap '' INT TERM; echo ready; sleep 600"


def undo_stops(server: LocalServer, times: int) -> None:
    """Answer as if the stop were taken, and forget it: what a busy server does."""
    server.faults.add("/runs/stop", times=times, status=200, body="null")


def submitted(server: LocalServer, command: str = "sleep 600") -> None:
    server.client().runs.submit({"type": "task", "commands": [command]}, run_name="job", marker="ours")


def stopped(server: LocalServer, caplog: pytest.LogCaptureFixture) -> bool:
    caplog.set_level(logging.INFO)
    log = logging.getLogger("stop")
    return stop_patiently(kill_client(server), "job", "ours", abort=False, log=log)


def test_a_stop_that_the_server_forgot_is_asked_for_again(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    submitted(server)
    undo_stops(server, 2)
    assert stopped(server, caplog)
    assert len(paths(server, "/runs/stop")) == 3
    assert over(run_of(server)).raw_status == "terminated"


def test_a_server_that_forgets_every_stop_is_told(
    server: LocalServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stop, "INSIST_SECONDS", 2.0)
    submitted(server)
    undo_stops(server, 99)
    assert not stopped(server, caplog)
    assert "may still be going; stop it with: dstack stop job" in caplog.text


def test_a_run_that_takes_its_time_to_end_is_asked_once(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.client().runs.submit(
        {"type": "task", "commands": [_STUBBORN], "stop_duration": 30}, run_name="job", marker="ours"
    )
    wait_for("running run", lambda: run_of(server).raw_status == "running")
    assert stopped(server, caplog)
    assert len(paths(server, "/runs/stop")) == 1
    run_of(server).stop(abort=True)


def test_a_run_that_is_over_is_not_stopped(server: LocalServer, caplog: pytest.LogCaptureFixture) -> None:
    submitted(server, "true")
    over(run_of(server))
    assert stopped(server, caplog)
    assert paths(server, "/runs/stop") == []


def test_a_killed_task_asks_again_for_a_stop_that_the_server_forgot(server: LocalServer) -> None:
    job = job_of(server, "sleep 600")

    def going() -> bool:
        if job.submitted and run_of(server).raw_status == "running":
            undo_stops(server, 1)
            return True
        return False

    with killed_when(going, job) as took:
        job.follow()
    assert job.stopped
    assert took[0] < 3.7
    assert len(paths(server, "/runs/stop")) == 2
    assert wait_until_over(server).raw_status == "terminated"


def test_a_killed_task_asks_airflow_for_nothing_that_it_needs(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = DstackRunOperator(
        task_id="train", configuration={"type": "task", "commands": ["sleep 600"]}, poll_interval=0.1
    )

    def kill() -> None:
        wait_for("running run", lambda: _status(server) == "running")
        # From here on Airflow is as silent as the supervisor of a process that it kills.
        monkeypatch.setattr(DstackHook, "get_connection", _silence)
        monkeypatch.setattr(_build, "task_state", _silence)
        task.on_kill()

    with health_server() as airflow:
        airflow.replies = {PUBLIC: (200, HEALTHY)}
        monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", f"{airflow.url}/execution/")
        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(DstackRunInterrupted, match="asked to stop"):
            task.execute(CONTEXT)
        thread.join()
    run = server.client().runs.get(RUN.name)
    assert run is not None
    assert over(run).raw_status == "terminated"


def _status(server: LocalServer) -> str:
    run = server.client().runs.get(RUN.name)
    return run.raw_status if run is not None else ""


def _silence(*told: object) -> None:
    raise AssertionError("Airflow was asked")
