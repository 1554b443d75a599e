"""Whole tasks through ``dag.test()``: both modes, good and bad ends, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_provider_dstack import operators
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths, runs_of

MODES = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
# With the longer pause, the run takes long enough for a deferrable task to be handed to the trigger.
_STEPS = "for i in 1 2 3 4 5 6 7 8; do echo step-$i; sleep {pause}; done; {end}"


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer without the pause that avoids a race with the scheduler; ``dag.test()`` has no such race."""
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.5)


def steps_in(output: str) -> list[str]:
    """Return the relayed steps; a record of several lines has each on a line of its own."""
    words = output.split()
    return [word for word in words if word.startswith("step-")]


def command(deferrable: bool, end: str = "true") -> str:
    return _STEPS.format(pause="0.5" if deferrable else "0.1", end=end)


@MODES
def test_a_run_relays_its_log_and_returns_its_outcome(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        f"configuration=Task(commands=[{command(deferrable)!r}]), poll_interval=0.3, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert (ended.state, ended.task_state) == ("success", "success")
    assert steps_in(output) == [f"step-{number}" for number in range(1, 9)]
    assert ("Pausing task as DEFERRED" in output) is deferrable
    assert "best offer " in output
    (run,) = runs_of(server, ended.marker)
    outcome = run.outcome()
    assert outcome is not None
    assert ended.result == outcome.to_dict()
    assert ended.result["exit_status"] == 0
    assert len(paths(server, "/runs/apply")) == 1


@MODES
def test_a_failing_run_fails_the_task_with_its_exit_status(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        f"configuration=Task(commands=[{command(deferrable, 'exit 7')!r}]), poll_interval=0.3, "
        f"deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert "DstackUserError" in output
    assert "exited with status 7" in output
    assert output.count("step-1") == 1
    assert len(runs_of(server, ended.marker)) == 1


def test_a_short_run_of_a_deferrable_task_is_not_deferred(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run("configuration={'type': 'task', 'commands': ['echo quick']}, deferrable=True")
    assert ended.task_state == "success"
    assert "DEFERRED" not in capfd.readouterr().out


def test_no_capacity_has_an_error_of_its_own(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run(
        "configuration={'type': 'task', 'commands': ['true']}, max_price='0.01', "
        "run_resources={'gpu': 'A100:16GB'}, poll_interval=0.3"
    )
    output = capfd.readouterr().out
    assert output.count("gpu memory: 16GB is an exact size; write 16GB.. for at least that. See ") == 1
    assert ended.task_state == "failed"
    assert "DstackNoCapacity" in output
    assert "set run_retry_policy to let the run itself wait for one" in output
    assert "no machine is on offer now" in output


def test_a_run_that_a_user_stops_has_an_error_of_its_own(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults.add("/logs/poll", delay=0.1)
    stop = (
        f"curl -s -X POST -H 'Authorization: Bearer {server.token}' -H 'Content-Type: application/json' "
        f'-d \'{{"runs_names": ["stop-me"], "abort": false}}\' {server.url}/api/project/main/runs/stop'
    )
    ended = dag_runner.run(
        f"configuration={{'type': 'task', 'commands': [{stop!r}, 'sleep 60']}}, run_name='stop-me', "
        "poll_interval=0.3"
    )
    assert ended.task_state == "failed"
    assert "DstackRunStopped" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "configuration={'type': 'task', 'commands': ['true'], 'ports': ['no port']}",
            "expected a port mapping",
        ),
        ("configuration={'type': 'dance'}", "got 'dance'"),
        ("configuration='commands: [unfinished'", "configuration"),
        ("configuration='nowhere.dstack.yml'", "expected a file 'nowhere.dstack.yml'"),
        ("configuration=Path('/nowhere/x.yml')", "/nowhere/x.yml"),
        (
            "configuration={'type': 'task', 'commands': ['true']}, run_name='No Name'",
            "run_name: expected 2 to 41 lower-case letters",
        ),
        (
            "configuration={'type': 'task', 'commands': ['true']}, max_price='cheap'",
            "max_price: expected USD per hour above 0, got 'cheap'",
        ),
        ("configuration={'type': 'task', 'commands': ['true']}, run_resources=[1]", "resources"),
        (
            "configuration={'type': 'task', 'commands': ['true']}, run_resources={'gpu': {'ram': 1}}",
            "resources.gpu.ram: there is no such field; check its spelling",
        ),
        (
            "configuration={'type': 'task', 'commands': ['true']}, dstack_conn_id='nobody'",
            "got none called 'nobody'",
        ),
        ("configuration={'type': 'task', 'commands': ['true']}, dstack_conn_id='bad_token'", "token"),
        ("configuration={'type': 'task', 'commands': ['true']}, dstack_conn_id='bad_project'", "nowhere"),
        ("configuration={'type': 'task', 'commands': ['true']}, project_name='nowhere2'", "nowhere2"),
        (
            "configuration={'type': 'task', 'commands': ['true']}, dstack_conn_id='no_token'",
            "expected a token, got none",
        ),
        (
            "configuration={'type': 'task', 'commands': ['true']}, repo_dir='/nowhere'",
            "repo_dir: expected a directory, got '/nowhere'",
        ),
        (
            "configuration={'type': 'task', 'commands': ['true'], 'env': ['A=b']}, mask_env=['NOPE']",
            "mask_env: expected names of variables in the run's env (A), got 'NOPE'. Correct it, ",
        ),
    ],
)
def test_bad_input_fails_at_once_and_submits_nothing(
    dag_runner: DagRunner,
    wrong_connections: LocalServer,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    arguments: str,
    told: str,
) -> None:
    ended = dag_runner.run(f"{arguments}, retries=3")
    # Airflow 3.1 logs an error of a template elsewhere.
    output = capfd.readouterr().out + caplog.text
    assert ended.task_state == "failed"
    assert told in output
    assert "Submitting anyway" not in output
    assert "AirflowFailException" in output
    assert paths(wrong_connections, "/runs/apply") == []
    assert wrong_connections.token not in output
    assert "not-the-token" not in output


def test_a_failed_run_is_left_to_airflows_retries(dag_runner: DagRunner, server: LocalServer) -> None:
    ended = dag_runner.run(
        "configuration={'type': 'task', 'commands': ['exit 1']}, poll_interval=0.2, retries=1, "
        "retry_delay=timedelta(0)"
    )
    assert ended.task_state == "failed"
    names = {run.name for run in runs_of(server, ended.marker)}
    assert len(names) == 2


def test_templates_are_rendered_wherever_they_are(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run(
        "configuration=Task(commands=['echo step-{{ task.task_id }}-$WHO'], env={'WHO': '{{ 40 + 2 }}'}), "
        "run_name='run-{{ ds_nodash }}', max_duration='{{ 3600 }}', poll_interval=0.2"
    )
    assert ended.task_state == "success"
    assert steps_in(capfd.readouterr().out) == ["step-train-42"]
    assert ended.result["run_name"].startswith("run-20")


def test_a_yaml_file_beside_the_dag_is_read_and_rendered(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    (dag_runner.folder / "train.dstack.yml").write_text(
        "type: task\nname: for-interactive-use\ncommands:\n  - echo step-{{ dag.dag_id }}\n"
    )
    ended = dag_runner.run("configuration='train.dstack.yml', poll_interval=0.2")
    assert ended.task_state == "success"
    assert steps_in(capfd.readouterr().out)[0].startswith("step-dag_")
    assert ended.result["run_name"].startswith("dag-")


def test_a_path_object_may_point_anywhere(dag_runner: DagRunner, server: LocalServer, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.yml"
    path.write_text("type: task\ncommands: ['true']\n")
    ended = dag_runner.run(f"configuration=Path({str(path)!r}), poll_interval=0.2")
    assert ended.task_state == "success"


@MODES
def test_an_exit_status_can_mean_to_skip_the_task(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        f"configuration=Task(commands=[{command(deferrable, 'exit 99')!r}]), poll_interval=0.3, "
        f"deferrable={deferrable}, skip_on_exit_code=[7, 99]"
    )
    assert ended.task_state == "skipped"
    assert "exited with status 99, which means to skip the task" in capfd.readouterr().out


def test_another_exit_status_fails_the_task(dag_runner: DagRunner, server: LocalServer) -> None:
    ended = dag_runner.run(
        "configuration=Task(commands=['exit 98']), poll_interval=0.3, skip_on_exit_code=99"
    )
    assert ended.task_state == "failed"


@pytest.mark.parametrize("path", ["{folder}/code", "code"], ids=["absolute", "beside the DAG"])
def test_a_run_gets_the_directory_and_starts_in_it(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    code = dag_runner.folder / "code"
    code.mkdir(exist_ok=True)
    (code / "steps.sh").write_text("echo step-from-code\n")
    ended = dag_runner.run(
        "configuration=Task(commands=['sh steps.sh']), poll_interval=0.2, "
        f"repo_dir={path.format(folder=dag_runner.folder)!r}"
    )
    assert ended.task_state == "success"
    assert steps_in(capfd.readouterr().out) == ["step-from-code"]


def test_mapped_tasks_may_have_one_run_name_in_common(dag_runner: DagRunner, server: LocalServer) -> None:
    dag = dag_runner.load(
        "from airflow.sdk import DAG\n"
        "from airflow_provider_dstack.operators import DstackRunOperator\n"
        "with DAG('mapped_names') as dag:\n"
        "    DstackRunOperator.partial(task_id='train', run_name='training', poll_interval=0.2).expand(\n"
        "        configuration=[{'type': 'task', 'commands': ['true']}] * 2)\n"
    )
    assert str(dag.test().state) == "success"
    assert {run.name for run in runs_of(server, "airflow:mapped_names/")} == {"training-0", "training-1"}


def test_the_log_can_be_left_out(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run(
        "configuration={'type': 'task', 'commands': ['echo step-1']}, get_logs=False, poll_interval=0.2"
    )
    assert ended.task_state == "success"
    assert steps_in(capfd.readouterr().out) == []
    assert paths(server, "/logs/poll") == []


@MODES
def test_execution_timeout_stops_the_run(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(
        f"configuration={{'type': 'task', 'commands': ['sleep 600']}}, deferrable={deferrable}, "
        f"execution_timeout=timedelta(seconds={4 if deferrable else 2}), poll_interval=0.3"
    )
    assert ended.task_state == "failed"
    assert "AirflowTaskTimeout" in capfd.readouterr().out
    (run,) = runs_of(server, ended.marker)
    assert paths(server, "/runs/stop")
    assert run.raw_status in ("terminating", "terminated")


@MODES
def test_a_lost_connection_is_retried(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    text = command(deferrable, "sleep 1")
    server.faults.add("/logs/poll", times=3, drop="before")
    server.faults.add("/runs/apply", drop="after")
    ended = dag_runner.run(
        f"configuration=Task(commands=[{text!r}]), poll_interval=0.3, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.task_state == "success"
    assert "The run keeps running; retrying for another" in output
    assert steps_in(output) == [f"step-{number}" for number in range(1, 9)]
    assert len(runs_of(server, ended.marker)) == 1
    assert paths(server, "/runs/stop") == []


def test_a_server_unreachable_for_longer_than_the_budget_fails_the_task(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults.add("/logs/poll", times=None, status=503)
    ended = dag_runner.run(
        "configuration={'type': 'task', 'commands': ['sleep 600']}, poll_interval=0.3, retry_budget=1.0"
    )
    assert ended.task_state == "failed"
    assert "DstackServerUnreachable" in capfd.readouterr().out
    # The run is stopped, because no process watches it any more.
    assert len(paths(server, "/runs/stop")) == 1
