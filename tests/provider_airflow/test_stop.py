"""Stops outside of a waiting task, such as a trigger's, and what they request from Airflow."""

from __future__ import annotations

import logging
import threading

import pytest

from airflow_provider_dstack._names import TaskNames, run_ref
from airflow_provider_dstack._stop import stop_task_run
from airflow_provider_dstack.errors import DstackRunInterrupted
from airflow_provider_dstack.hooks import DstackHook
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core.integration import StopResult, StopState
from dstack_core.local import LocalServer
from tests.provider_airflow.support import over, paths, wait_for
from tests.provider_airflow.test_operator import CONTEXT, RUN
from tests.provider_airflow.test_task_run import OURS, run_of

_STUBBORN = "trap '' INT TERM; echo ready; sleep 600"


def submitted(server: LocalServer, command: str = "sleep 600") -> None:
    server.client().runs.submit({"type": "task", "commands": [command]}, run_name="job", marker="ours")


def stopped(
    server: LocalServer, caplog: pytest.LogCaptureFixture, timeout: float | None = None
) -> StopResult:
    caplog.set_level(logging.INFO)
    with server.client() as client:
        return stop_task_run(
            client, OURS, action="stop", log=logging.getLogger("stop"), timeout=timeout, run_id=None
        )


@pytest.mark.parametrize("dropped", [1, 3])
def test_a_stop_that_the_server_dropped_is_repeated(
    server: LocalServer, caplog: pytest.LogCaptureFixture, dropped: int
) -> None:
    submitted(server)
    server.faults.forget_stops(times=dropped)
    assert stopped(server, caplog).state in (StopState.STOPPING, StopState.ENDED)
    assert len(paths(server, "/runs/stop")) == dropped + 1
    assert over(run_of(server)).raw_status == "terminated"


def test_a_server_that_drops_every_stop_is_reported_with_the_runs_page(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    submitted(server)
    server.faults.forget_stops(times=None)
    assert not stopped(server, caplog, timeout=3.0).is_safe
    last = caplog.records[-1]
    assert last.levelno == logging.ERROR
    assert last.getMessage().endswith(run_of(server).url)
    assert "dstack stop" not in caplog.text


def test_a_run_that_ends_slowly_is_stopped_once(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.client().runs.submit(
        {"type": "task", "commands": [_STUBBORN], "stop_duration": 30}, run_name="job", marker="ours"
    )
    wait_for("running run", lambda: run_of(server).raw_status == "running")
    assert stopped(server, caplog).state is StopState.STOPPING
    assert len(paths(server, "/runs/stop")) == 1
    run_of(server).stop(abort=True)


def test_stopping_a_run_that_has_ended_is_not_an_error(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    submitted(server, "true")
    over(run_of(server))
    assert stopped(server, caplog).state is StopState.ENDED
    assert caplog.records[-1].levelno == logging.INFO


def test_a_generated_name_is_known_by_its_marker() -> None:
    names = TaskNames("airflow:d/r/t[3]", "5f1c9a", 2, 3, 1)
    assert names.run.generated
    assert run_ref(names.run.name, names.run.marker).generated
    assert not run_ref("train", names.run.marker).generated
    assert not run_ref(names.run.name, "airflow:d/r/t[3]/3of4#5f1c9a").generated
    assert not run_ref(names.run.name, "anything").generated
    assert not TaskNames("airflow:d/r/t", "5f1c9a", 2, 3, 1, chosen="train").run.generated


@pytest.mark.usefixtures("ended_by_a_user")
def test_a_killed_task_stops_its_run_without_asking_for_its_connection(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = DstackRunOperator(
        task_id="train", configuration={"type": "task", "commands": ["sleep 600"]}, poll_interval=0.1
    )

    def kill() -> None:
        wait_for("running run", lambda: _status(server) == "running")
        # From here on Airflow does not answer, like the supervisor of a process that it kills.
        monkeypatch.setattr(DstackHook, "get_connection", _no_answer)
        task.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DstackRunInterrupted, match="The task was ended before its run"):
        task.execute(CONTEXT)
    thread.join()
    run = server.client().runs.get(RUN.name)
    assert run is not None
    assert over(run).raw_status == "terminated"


def _status(server: LocalServer) -> str:
    run = server.client().runs.get(RUN.name)
    return run.raw_status if run is not None else ""


def _no_answer(*arguments: object) -> None:
    raise AssertionError("Airflow was asked")
