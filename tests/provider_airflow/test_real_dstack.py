"""A DAG's tasks on a real dstack server: lines, outcome, failure, and a stop when the time is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dstack_core import Client, RunStatus
from tests.provider_airflow.support import DagRunner, connection_json, wait_for
from tests.rig.server import RealServer

pytestmark = pytest.mark.real
MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])


@pytest.fixture(scope="module")
def real() -> Iterator[RealServer]:
    with RealServer() as server:
        yield server


@pytest.fixture
def arguments(real: RealServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(real))
    return f"user='root', fleets=[{real.fleet!r}])"


@MODES
def test_a_task_on_a_real_server(
    dag_runner: DagRunner, arguments: str, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    command = "for i in 1 2 3 4; do echo step-$i of $WHO; sleep 2; done"
    ended = dag_runner.run(
        f"configuration=Task(commands=[{command!r}], env={{'WHO': 'all'}}, {arguments}, "
        f"poll_interval=0.5, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.state == "success"
    assert "Plan for run af-" in output
    assert [word for word in output.split() if word.startswith("step-")] == [f"step-{i}" for i in range(1, 5)]
    assert (ended.result["status"], ended.result["exit_status"]) == ("done", 0)


@MODES
def test_a_failing_task_on_a_real_server(
    dag_runner: DagRunner, arguments: str, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        f"configuration=Task(commands=['echo before', 'sleep 6', 'exit 7'], {arguments}, "
        f"poll_interval=0.5, deferrable={deferrable}"
    )
    assert ended.task_state == "failed"
    assert "exited with status 7" in capfd.readouterr().out


def test_a_timeout_stops_the_run_on_a_real_server(
    dag_runner: DagRunner, real: RealServer, arguments: str
) -> None:
    ended = dag_runner.run(
        f"configuration=Task(commands=['echo started', 'sleep 600'], {arguments}, poll_interval=0.5, "
        "execution_timeout=timedelta(seconds=5), deferrable=False"
    )
    assert ended.task_state == "failed"
    with Client(server_url=real.url, project_name=real.project, user_token=real.token) as client:
        runs = [run for run in client.runs.list(all=True) if (run.marker or "").startswith(ended.marker)]
        assert len(runs) == 1
        status = wait_for("end of the run", lambda: _end(runs[0].status()))
    assert status == RunStatus.TERMINATED


def _end(status: RunStatus) -> RunStatus | None:
    return status if status.is_finished else None
