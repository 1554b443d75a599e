"""A DAG's fleet, secrets and budget on a real dstack server; the fleet and a secret on one that answers late."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest

from tests.provider_airflow.slow_proxy import SlowProxy
from tests.provider_airflow.support import DagRunner, client_of, connection_json, runs_of
from tests.rig.server import RealServer

pytestmark = pytest.mark.real

VALUE = "hf_0123456789abcdef"
HEAD = """
from airflow_provider_dstack.budgets import DstackBudget
from airflow_provider_dstack.project_secrets import dstack_secrets
"""
EMPTY = """
with dstack_fleet("gpus", {"nodes": "0..2"}) as fleet, dstack_secrets({"HF_TOKEN": "{{ var.value.hf_token }}"}):
    @task
    def name(fleet):
        return fleet
    name(fleet.name)
"""
RUN = """
with dstack_secrets({{"HF_TOKEN": "{{{{ var.value.hf_token }}}}"}}) as secrets:
    train = DstackRunOperator(
        task_id="train",
        configuration=Task(commands=["echo got ${{#HF_TOKEN}} characters"], fleets=[{fleet!r}], user="root"),
        env=secrets.env,
        max_cost=5,
        poll_interval=0.5,
    )
    DstackBudget(max_cost=20).covers(train)
"""


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_VAR_HF_TOKEN", VALUE)


def test_a_fleet_and_a_secret_live_as_long_as_their_group(
    dag_runner: DagRunner, real: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = urlsplit(real.url).port
    assert port is not None
    with SlowProxy(port, 2.0) as proxy:
        connection = json.loads(connection_json(real)) | {"host": proxy.url}
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", json.dumps(connection))
        ran = dag_runner.run_tasks(EMPTY, HEAD)
    assert set(ran.tasks.values()) == {"success"}, ran.tasks
    fleet = ran.values["gpus.create_fleet"]
    assert ran.values["gpus.secrets.name"] == fleet
    assert ran.values["gpus.delete_fleet"] == {fleet: "deleted"}
    (secret,) = ran.values["gpus.secrets.delete_secrets"]
    with client_of(real) as client:
        assert fleet not in [one.name for one in client.fleets.list()]
        assert secret not in [one.name for one in client.secrets.list()]


def test_a_run_within_its_budget_gets_the_secret(
    dag_runner: DagRunner, real: RealServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = dag_runner.run_tasks(RUN.format(fleet=real.fleet), HEAD)
    output = capfd.readouterr()
    assert set(ran.tasks.values()) == {"success"}, ran.tasks
    assert f"got {len(VALUE)} characters" in output.out
    assert VALUE not in output.out + output.err
    (budget,) = (found for task, found in ran.values.items() if task.endswith("train_budget"))
    assert budget["left"] == 20
    (run,) = runs_of(real, f"airflow:{ran.dag_id}/")
    assert VALUE not in json.dumps(run.env)
    with client_of(real) as client:
        assert ran.values["secrets.delete_secrets"][0] not in [one.name for one in client.secrets.list()]
