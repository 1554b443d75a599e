"""``airflow dstack ps``, ``cost`` and ``doctor``, as an administrator runs them: in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from airflow.models import Connection
from airflow.utils.session import create_session

from dstack_core import Task
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, json_in
from tests.provider_airflow.test_reap_command import airflow
from tests.provider_airflow.versions import needs_3_2

# Before 3.2 Airflow takes no commands from providers.
pytestmark = [pytest.mark.slow, needs_3_2]

CONN_ID = "command_cluster"


@pytest.fixture
def connection(dag_runner: DagRunner, server: LocalServer) -> Iterator[str]:
    """Add a connection to Airflow's database, which ``dag_runner`` has made."""
    host, _, port = server.url.rpartition(":")
    with create_session() as session:
        row = Connection(CONN_ID, "dstack", host=host, port=int(port), login="main", password=server.token)
        session.add(row)
        session.add(Connection("of_http", "http", host="http://127.0.0.1"))
    yield CONN_ID
    with create_session() as session:
        for each in session.query(Connection).filter(Connection.conn_id.in_([CONN_ID, "of_http"])):
            session.delete(each)


def test_runs_of_tasks_are_listed_and_what_they_cost(server: LocalServer, connection: str) -> None:
    with server.client() as client:
        for name, marker in (
            ("of-a-task", "airflow:train/manual__1/fit/1of1#abcdef"),
            ("of-a-user", "user:me"),
        ):
            client.runs.submit(Task(commands=["true"]), name, marker=marker).wait(60, poll_interval=0.1)
    listed = airflow("dstack", "ps", "--conn-id", connection, "--all", "-o", "json")
    assert listed.returncode == 0, listed.stderr
    assert [row["name"] for row in json_in(listed.stdout)] == ["of-a-task"]
    assert listed.stdout
    every = airflow("dstack", "ps", "--conn-id", connection, "--all", "--every")
    assert {"of-a-task", "of-a-user"} <= {line.split()[0] for line in every.stdout.splitlines() if line}
    costs = airflow("dstack", "cost", "--conn-id", connection, "-o", "json")
    assert costs.returncode == 0, costs.stderr
    assert {row["group"] for row in json_in(costs.stdout)} >= {"airflow:train", "user:me"}
    of_dag = airflow("dstack", "cost", "--conn-id", connection, "--dag", "train", "--since", "1d", "--csv")
    assert of_dag.stdout.splitlines()[-2:][0] == "task,runs,cost_usd"
    assert of_dag.stdout.splitlines()[-1].startswith("fit,1,0.")
    wrong = airflow("dstack", "cost", "--conn-id", connection, "--by", "colour")
    assert (wrong.returncode, "--by: expected owner" in wrong.stderr) == (1, True)
    missing = airflow("dstack", "ps", "--conn-id", "no_such_connection")
    assert (missing.returncode, "no_such_connection" in missing.stderr) == (1, True)


def test_doctor_checks_dstack_and_airflow(server: LocalServer, connection: str) -> None:
    # Nothing listens there: these tests run without an API server.
    address = {"AIRFLOW__API__BASE_URL": "http://127.0.0.1:9"}
    found = airflow("dstack", "doctor", "--conn-id", connection, "-o", "json", **address)
    states = {each["check"]: each["state"] for each in json_in(found.stdout)}
    assert found.returncode == 0, found.stdout
    assert (states["token"], states["machines"], states["Airflow"]) == ("ok", "ok", "warning")
    assert server.token not in found.stdout + found.stderr
    for conn_id, words in (("no_such_connection", "no_such_connection"), ("of_http", "of type http")):
        failed = airflow("dstack", "doctor", "--conn-id", conn_id, **address)
        assert failed.returncode == 1
        assert words in failed.stdout
