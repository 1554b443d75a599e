"""``DstackReapOperator`` in an Airflow: what it asks, returns and raises."""

from __future__ import annotations

from typing import Any, cast

import pytest

from airflow_provider_dstack._compat import TaskFacts
from airflow_provider_dstack.errors import DstackRunInterrupted
from airflow_provider_dstack.reaper import DstackReapOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths, runs_of
from tests.provider_airflow.test_reaper import SERVICE, facts, is_stopped, submit, train
from tests.provider_airflow.versions import needs_3_2


def test_a_killed_reaper_stops_nothing(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.client() as client:
        submit(client, train())
    reaper = DstackReapOperator(task_id="reap", min_age=600)

    def ask(task: Any) -> TaskFacts:
        reaper.on_kill()
        return facts("failed", ended=None)

    monkeypatch.setattr("airflow_provider_dstack._compat.worker_task", ask)
    with pytest.raises(DstackRunInterrupted, match="No run was stopped"):
        reaper.execute({})
    assert paths(server, "/runs/stop") == []


@pytest.mark.parametrize("name", ["dry_run", "stop_unknown", "stop_services"])
def test_a_switch_must_be_a_bool(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected True or False, got 'False'"):
        DstackReapOperator(task_id="reap", **cast("dict[str, Any]", {name: "False"}))


def test_a_negative_age_is_refused() -> None:
    with pytest.raises(ValueError, match="min_age"):
        DstackReapOperator(task_id="reap", min_age=-1)


@needs_3_2
def test_the_operator_asks_the_airflow_it_runs_in(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run("configuration={'type': 'task', 'commands': ['exit 1']}, poll_interval=0.2")
    (over,) = runs_of(server, ended.marker)
    assert over.marker is not None
    # A run that a lost worker left looks the same.
    with server.client() as client:
        left, kept = submit(client, over.marker), submit(client, f"{over.marker}/keep")
        others = submit(client, over.marker.replace("#", "#0")[:-1])
        gone = submit(client, over.marker.replace("/train/", "/gone/"))
        served = submit(client, over.marker, SERVICE)
    capfd.readouterr()
    ran = dag_runner.run_tasks("DstackReapOperator(task_id='reap', min_age=0.5)\n")
    assert ran.tasks == {"reap": "success"}
    assert {found["run_name"]: found["action"] for found in ran.values["reap"]} == {
        left.name: "stopped",
        kept.name: "left",
        others.name: "left",
        gone.name: "left",
        # Its task failed.
        served.name: "stopped",
    }
    assert is_stopped(left)
    assert not is_stopped(kept)
    output = capfd.readouterr().out
    assert f"Stopped: run {left.name} ({left.url})" in output
    assert "5 active runs of Airflow tasks in project main: " in output
    assert server.token not in output


@needs_3_2
def test_the_operator_fails_when_a_run_could_not_be_stopped(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = dag_runner.run("configuration={'type': 'task', 'commands': ['exit 1']}, poll_interval=0.2")
    (over,) = runs_of(server, ended.marker)
    with server.client() as client:
        left = submit(client, over.marker or "")
    server.faults.add("/runs/stop", status=403, times=None)
    ran = dag_runner.run_tasks("DstackReapOperator(task_id='reap', min_age=0)\n")
    assert ran.tasks == {"reap": "failed"}
    output = capfd.readouterr().out
    assert f"Not stopped: run {left.name}" in output
    assert "1 that failed. Stop these runs:" in output


@pytest.mark.parametrize(("action", "end"), [("keep", "/keep"), ("stop", ""), ("abort", "")])
def test_what_is_to_be_kept_is_in_the_marker(
    dag_runner: DagRunner, server: LocalServer, action: str, end: str
) -> None:
    ended = dag_runner.run(
        f"configuration=Task(commands=['true']), poll_interval=0.2, on_kill_action={action!r}"
    )
    (run,) = runs_of(server, ended.marker)
    assert (run.marker or "").endswith(f"/1of1#{(run.marker or '').partition('#')[2][:6]}{end}")
