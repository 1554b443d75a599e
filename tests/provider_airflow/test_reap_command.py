"""``airflow dstack reap``, as an administrator runs it: in a process of its own, on Airflow's database."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from airflow.models import Connection
from airflow.utils.session import create_session

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, json_in, paths, runs_of
from tests.provider_airflow.versions import needs_3_2

# Before 3.2 Airflow takes no commands from providers.
pytestmark = [pytest.mark.slow, needs_3_2]

CONN_ID = "gpu_cluster"
LONG = {"type": "task", "commands": ["sleep 600"]}


def airflow(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("airflow")
    return subprocess.run(
        [command, *arguments],
        env={**os.environ, "COLUMNS": "110", **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@dataclass(frozen=True)
class Leftovers:
    """A run whose task failed, one of another Airflow, and what Airflow calls the task instance."""

    left: Run
    others: Run
    task_instance: str


@pytest.fixture
def leftovers(dag_runner: DagRunner, server: LocalServer) -> Iterator[Leftovers]:
    """Leave runs behind, and keep the connection in Airflow's database alone."""
    ended = dag_runner.run("configuration={'type': 'task', 'commands': ['exit 1']}, poll_interval=0.2")
    (over,) = runs_of(server, ended.marker)
    marker = over.marker or ""
    host, _, port = server.url.rpartition(":")
    with create_session() as session:
        row = Connection(CONN_ID, "dstack", host=host, port=int(port), login="main", password=server.token)
        session.add(row)
    with server.client() as client:
        yield Leftovers(
            client.runs.submit(LONG, run_name="left", marker=marker),
            client.runs.submit(LONG, run_name="others", marker=marker.replace("#", "#0")[:-1]),
            marker.removeprefix("airflow:").rpartition("/")[0],
        )
    with create_session() as session:
        session.delete(session.merge(row))


def test_the_command_shows_and_stops_what_is_left(server: LocalServer, leftovers: Leftovers) -> None:
    shown = airflow("dstack", "reap", "--conn-id", CONN_ID, "--dry-run", "--min-age", "0")
    assert shown.returncode == 0, shown.stderr
    assert "2 active runs of Airflow tasks in project main: 1 left, 1 would be stopped." in shown.stdout
    page, task = leftovers.left.url, leftovers.task_instance
    assert (
        f"Would stop: run left ({page}) of {task}, try 1 (failed): its task has ended"
        in shown.stdout.splitlines()
    )
    assert paths(server, "/runs/stop") == []
    stopped = airflow("dstack", "reap", "--conn-id", CONN_ID, "--min-age", "0", "-o", "json")
    assert stopped.returncode == 0, stopped.stderr
    found = {one["run_name"]: one for one in json_in(stopped.stdout)}
    assert found["left"] == {
        "run_name": "left",
        "url": leftovers.left.url,
        "task_instance": leftovers.task_instance,
        # As all of Airflow's commands do, it prints texts.
        "try_number": "1",
        "state": "failed",
        "action": "stopped",
        "reason": "its task has ended",
    }
    assert found["others"]["action"] == "left"
    assert leftovers.left.refresh().raw_status in ("terminating", "terminated")
    assert leftovers.others.refresh().outcome() is None
    for done in (shown, stopped):
        assert server.token not in done.stdout + done.stderr


def test_a_task_that_just_failed_is_given_its_time(server: LocalServer, leftovers: Leftovers) -> None:
    done = airflow("dstack", "reap", "--conn-id", CONN_ID, "--min-age", "3600", "-o", "json")
    (left,) = (one for one in json_in(done.stdout) if one["run_name"] == "left")
    assert left["action"] == "left"
    assert left["reason"].startswith("its task ended ")
    assert paths(server, "/runs/stop") == []


def test_a_stop_that_is_refused_ends_the_command_with_1(server: LocalServer, leftovers: Leftovers) -> None:
    server.faults.add("/runs/stop", status=403, times=None)
    done = airflow("dstack", "reap", "--conn-id", CONN_ID, "--min-age", "0", "-o", "json")
    assert done.returncode == 1
    assert {one["action"] for one in json_in(done.stdout)} == {"not stopped", "left"}
    assert leftovers.left.url in done.stderr
    assert server.token not in done.stdout + done.stderr


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("conn_id", "environment", "told"),
    [
        ("nowhere", {}, "got none called 'nowhere'"),
        ("bad_token", {}, "token"),
        ("bad_url", {}, "http://127.0.0.1:9"),
        (
            "dstack_default",
            {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "sqlite:////nowhere/airflow.db"},
            "Airflow's database: expected an answer",
        ),
    ],
    ids=["connection", "token", "dstack server", "Airflow's database"],
)
def test_a_wrong_connection_or_database_is_one_message_and_stops_nothing(
    wrong_connections: LocalServer, conn_id: str, environment: dict[str, str], told: str
) -> None:
    done = airflow("dstack", "reap", "--conn-id", conn_id, **environment)
    assert done.returncode == 1
    assert "active run" not in done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert paths(wrong_connections, "/runs/stop") == []
    assert wrong_connections.token not in done.stderr


def test_the_help_reads_well() -> None:
    shown = airflow("dstack", "reap", "--help")
    assert shown.returncode == 0
    assert "--dry-run         Show what would be stopped, stop nothing" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 110
