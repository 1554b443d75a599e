"""A service whose name is taken by an active run: updated in place, replaced, or refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core import Run
from dstack_core.local import LocalServer
from tests.ports import free_port
from tests.provider_airflow.support import paths, runs_of, wait_for
from tests.provider_airflow.test_operator import TI

_SERVE = "python3 -m http.server {port} --bind 127.0.0.1 --directory {folder}"


def context(dag_run: str, **change: Any) -> Any:
    return {"ti": SimpleNamespace(**{**vars(TI), "run_id": dag_run, **change})}


def operator(port: int, folder: Path, **arguments: Any) -> DstackServiceOperator:
    """Return an operator that deploys a service, which answers with the name of the folder's only file."""
    what = {
        "type": "service",
        "port": port,
        "auth": False,
        "commands": [_SERVE.format(port=port, folder=folder)],
    }
    given = {"configuration": what, "run_name": "chat", "poll_interval": 0.2, **arguments}
    return DstackServiceOperator(task_id="train", **given)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("")
    return tmp_path / "before", tmp_path / "after"


@pytest.fixture
def active(server: LocalServer, folders: tuple[Path, Path]) -> tuple[int, Run]:
    """Deploy a service in an earlier DAG run; return its port and its run."""
    port = free_port()
    operator(port, folders[0]).execute(context("earlier"))
    (run,) = runs_of(server, "airflow:d/earlier/")
    return port, run


def test_a_taken_name_is_refused_and_the_choices_are_named(
    server: LocalServer, active: tuple[int, Run], folders: tuple[Path, Path]
) -> None:
    with pytest.raises(DstackError) as caught:
        operator(active[0], folders[1]).execute(context("later"))
    assert 'on_active="update" or on_active="replace"' in str(caught.value)
    assert "owner" not in str(caught.value)
    assert active[1].refresh().raw_status == "running"
    assert paths(server, "/runs/stop") == []


def test_an_active_service_is_updated_in_place(
    server: LocalServer,
    active: tuple[int, Run],
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, run = active
    task = operator(port, folders[1], on_active="update")
    lines = _info_of(task, monkeypatch)
    url = task.execute(context("later"))
    assert [line for line in lines if "chat, which is active" in line or "chat has the new" in line] == [
        f"Updating run chat, which is active: {run.url}",
        "Run chat has the new configuration.",
    ]
    assert "after.txt" in requests.get(url, timeout=10).text
    (updated,) = runs_of(server, "airflow:d/later/")
    assert updated.id == run.id
    # The reaper does not stop a service that a failed update may have left unchanged.
    assert (updated.marker or "").endswith("/keep")
    assert paths(server, "/runs/stop") == []


def test_an_active_service_is_replaced(
    server: LocalServer, active: tuple[int, Run], folders: tuple[Path, Path]
) -> None:
    port, run = active
    url = operator(port, folders[1], on_active="replace").execute(context("later"))
    assert "after.txt" in requests.get(url, timeout=10).text
    (new,) = runs_of(server, "airflow:d/later/")
    assert new.id != run.id
    assert len(paths(server, "/runs/stop")) == 1


@pytest.mark.parametrize("on_active", ["update", "replace"])
def test_a_name_that_is_free_is_submitted(
    server: LocalServer, folders: tuple[Path, Path], on_active: str
) -> None:
    operator(free_port(), folders[0], on_active=on_active).execute(context("first"))
    assert len(runs_of(server, "airflow:d/first/")) == 1
    assert len(paths(server, "/runs/apply")) == 1


def test_a_change_that_needs_a_new_run_fails_the_task_and_leaves_the_service(
    server: LocalServer,
    active: tuple[int, Run],
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = operator(active[0], folders[1], on_active="update", max_price=3.5)
    lines = _info_of(task, monkeypatch)
    with pytest.raises(AirflowFailException, match='on_active="replace" to stop it'):
        task.execute(context("later"))
    assert any("Updating run chat" in line for line in lines)
    assert not any("has the new configuration" in line or "is updated" in line for line in lines)
    assert active[1].refresh().raw_status == "running"
    assert paths(server, "/runs/stop") == []


def _info_of(task: DstackServiceOperator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the lines a task logs at level INFO."""
    lines: list[str] = []
    monkeypatch.setattr(task.log, "info", lambda text, *values: lines.append(text % values))
    return lines


def _deployed_until(task: DstackServiceOperator, dag_run: str, moment: Callable[[], Any]) -> None:
    """Execute a task, and end it as a user does once ``moment`` is there."""

    def end() -> None:
        wait_for("moment to end", moment)
        task.on_kill()

    user = threading.Thread(target=end)
    user.start()
    try:
        with pytest.raises(DstackRunInterrupted):
            task.execute(context(dag_run))
    finally:
        user.join()


@pytest.mark.usefixtures("ended_by_a_user")
def test_an_ended_task_leaves_the_service_that_it_updates(
    server: LocalServer, active: tuple[int, Run], folders: tuple[Path, Path]
) -> None:
    port, run = active
    task = operator(port, folders[1], on_active="update")
    what: Any = task.configuration
    what["commands"] = ["sleep 600"]
    _deployed_until(task, "later", lambda: len(paths(server, "/runs/apply")) > 1 and task._task_run)
    assert run.refresh().outcome() is None
    assert paths(server, "/runs/stop") == []


@pytest.mark.usefixtures("ended_by_a_user")
def test_an_ended_task_stops_the_service_that_it_submitted(
    server: LocalServer, folders: tuple[Path, Path]
) -> None:
    task = operator(free_port(), folders[1], on_active="update")
    what: Any = task.configuration
    what["commands"] = ["sleep 600"]
    _deployed_until(task, "first", lambda: runs_of(server, "airflow:d/first/"))
    (run,) = runs_of(server, "airflow:d/first/")
    wait_for("end of the service", lambda: run.refresh().outcome(), 30)


def test_the_choice_is_checked_when_the_dag_is_parsed(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="on_active"):
        operator(80, folders[0], on_active="explode")
    with pytest.raises(ValueError, match="expected a run_name"):
        operator(80, folders[0], on_active="update", run_name=None)
