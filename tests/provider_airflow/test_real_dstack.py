"""A DAG's tasks on a real dstack server: lines, outcome, code, failure, and a stop when the time is up."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from dstack_core import RunStatus
from tests.provider_airflow.support import DagRunner, lines_in, over, runs_of
from tests.rig.server import RealServer

pytestmark = pytest.mark.real
MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])


@MODES
def test_a_task_on_a_real_server(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    command = "for i in 1 2 3 4; do echo step-$i of $WHO; sleep 2; done; echo step-☃; printf step-last"
    ended = dag_runner.run(
        f"configuration=Task(commands=[{command!r}], env={{'WHO': 'all'}}), "
        f"poll_interval=0.5, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.state == "success"
    assert "Plan for run " in output
    steps = [*(f"step-{i} of all" for i in range(1, 5)), "step-☃", "step-last"]
    assert lines_in(output, "step-") == steps
    (run,) = runs_of(real, ended.marker)
    outcome = run.outcome()
    assert outcome is not None
    assert ended.result == outcome.to_dict()
    assert (ended.result["status"], ended.result["exit_status"]) == ("done", 0)


@MODES
def test_a_failing_task_on_a_real_server(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        "configuration=Task(commands=['echo before', 'sleep 6', 'exit 7']), "
        f"poll_interval=0.5, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert "exited with status 7" in output
    assert output.count("before") == 1
    (run,) = runs_of(real, ended.marker)
    assert run.raw_status == "failed"


@MODES
def test_a_timeout_stops_the_run_on_a_real_server(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        "configuration=Task(commands=['echo started', 'sleep 600']), poll_interval=0.5, "
        f"execution_timeout=timedelta(seconds={12 if deferrable else 6}), deferrable={deferrable}"
    )
    assert ended.task_state == "failed"
    assert "AirflowTaskTimeout" in capfd.readouterr().out
    (run,) = runs_of(real, ended.marker)
    assert over(run).status() == RunStatus.TERMINATED


def test_the_code_of_repo_dir_is_there_on_a_real_server(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "steps.sh").write_text("echo step-from-code\n")
    ended = dag_runner.run(
        f"configuration=Task(commands=['sh steps.sh']), poll_interval=0.5, repo_dir={str(tmp_path)!r}"
    )
    assert ended.task_state == "success"
    assert lines_in(capfd.readouterr().out, "step-") == ["step-from-code"]
    assert [run.raw_status for run in runs_of(real, ended.marker)] == ["done"]


def test_mapped_tasks_have_a_run_each_on_a_real_server(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(
        """
tries = [Task(commands=[f"echo step-{number}"], env={"RATE": str(number)}) for number in (1, 2)]
train = DstackRunOperator.partial(task_id="train", poll_interval=0.5).expand(configuration=tries)

@task
def names(outcomes):
    return [outcome["run_name"] for outcome in outcomes]

names(train.output)
"""
    )
    assert ran.state == "success"
    runs = runs_of(real, f"airflow:{ran.dag_id}/")
    assert {run.raw_status for run in runs} == {"done"}
    by_index = {(run.marker or "").split("/")[2]: run.name for run in runs}
    assert sorted(by_index) == ["train[0]", "train[1]"]
    assert ran.values["names"] == [by_index["train[0]"], by_index["train[1]"]]
    assert sorted(lines_in(capfd.readouterr().out, "step-")) == ["step-1", "step-2"]


def test_a_secret_of_the_project_is_filled_in_by_a_real_server(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str]
) -> None:
    reply = requests.post(
        f"{real.url}/api/project/{real.project}/secrets/create_or_update",
        json={"name": "word", "value": "of-the-server"},
        headers={"Authorization": f"Bearer {real.token}"},
        timeout=30,
    )
    assert reply.ok, reply.text
    ended = dag_runner.run(
        "configuration={'type': 'task', 'env': {'WORD': '${{ secrets.word }}'}, "
        "'commands': ['echo step-$WORD-{{ task.task_id }}']}, poll_interval=0.5"
    )
    assert ended.task_state == "success"
    assert lines_in(capfd.readouterr().out, "step-") == ["step-of-the-server-train"]
