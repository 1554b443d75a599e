"""Setup tasks that a user marked success set up nothing: no run starts without its secrets, fleet or volume."""

from __future__ import annotations

import pytest

from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner

HEAD = """
from airflow_provider_dstack.project_secrets import DstackSecretsOperator, dstack_secrets
from airflow_provider_dstack.volumes import DstackVolumeOperator

TASK = {"type": "task", "commands": ["true"]}
VOLUME = {"backend": "aws", "region": "eu-west-1", "size": "10GB"}
"""
SECRETS = """
with dstack_secrets({{"HF_TOKEN": "{{{{ var.value.hf_token }}}}"}}) as group:
    DstackRunOperator(task_id="train", configuration=TASK, poll_interval=0.2, env={env})
"""
FLEET = """
group = DstackFleetOperator(task_id="create", configuration={{"nodes": "0..1"}})
create = DstackVolumeOperator(task_id="volume", configuration=VOLUME)
[group, create] >> DstackRunOperator(task_id="train", configuration={configuration}, poll_interval=0.2)
"""
MARKED = "\n{}.execute = lambda context: None\n"
ENVS = ["group.env", "{'HF': group.env['HF_TOKEN']}", "{'HF': f\"x{group.env['HF_TOKEN']}\"}"]


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_VAR_HF_TOKEN", "hf_0123456789")


@pytest.mark.parametrize("env", ENVS)
def test_no_run_starts_without_the_secrets_of_a_setup_that_was_marked_success(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], env: str
) -> None:
    ran = dag_runner.run_tasks(SECRETS.format(env=env) + MARKED.format("group.create"), HEAD)
    assert (ran.tasks["secrets.set_secrets"], ran.tasks["secrets.train"]) == ("success", "failed")
    assert server.runs == []
    shown = "".join(capfd.readouterr())
    assert "env: expected the project secrets of task secrets.set_secrets, got none: that task was" in shown
    assert "Clear it, and with it its downstream tasks." in shown


@pytest.mark.parametrize("env", ENVS)
def test_a_run_starts_with_the_secrets_that_were_set(
    dag_runner: DagRunner, server: LocalServer, env: str
) -> None:
    assert dag_runner.run_tasks(SECRETS.format(env=env), HEAD).state == "success"
    assert len(server.runs) == 1


@pytest.mark.parametrize(
    ("configuration", "marked", "error"),
    [
        ("{**TASK, 'fleets': [group.output]}", "group", "the fleet of task create"),
        ("{**TASK, 'fleets': [\"{{ ti.xcom_pull('create') }}\"]}", "group", "the fleet of task create"),
        ("{**TASK, 'volumes': [f'{create.output}:/data']}", "create", "the volume of task volume"),
        (
            "Task(commands=['true'], volumes=[f'{create.output}:/data'])",
            "create",
            "the volume of task volume",
        ),
    ],
)
def test_nor_for_a_fleet_or_volume_that_was_not_created(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    configuration: str,
    marked: str,
    error: str,
) -> None:
    body = FLEET.format(configuration=configuration)
    assert dag_runner.run_tasks(body, HEAD).tasks["train"] == "success"
    assert len(server.runs) == 1
    assert dag_runner.run_tasks(body + MARKED.format(marked), HEAD).tasks["train"] == "failed"
    assert len(server.runs) == 1
    assert f"configuration: expected {error}, got none" in "".join(capfd.readouterr())


def test_a_default_of_the_dags_own_is_left(dag_runner: DagRunner, server: LocalServer) -> None:
    env = "{'HF': \"{{ ti.xcom_pull('secrets.set_secrets') or 'none' }}\"}"
    ran = dag_runner.run_tasks(SECRETS.format(env=env) + MARKED.format("group.create"), HEAD)
    assert ran.tasks["secrets.train"] == "success"
    assert server.runs[0].configuration["env"] == {"HF": "none"}
