"""With ``ui_url``, nothing that a person reads has the address at which the workers reach the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_provider_dstack import operators
from dstack_core import CallbackEvent, RunCallbacks
from dstack_core.local import LocalServer
from tests.ports import free_port
from tests.provider_airflow.support import DagRunner, runs_of
from tests.provider_airflow.test_services import service
from tests.provider_airflow.test_tags import connect

# A proxy may add a path.
UI = "https://ui.example.com/dstack"
# Long enough for a deferral on a slow machine.
SECONDS = {False: 1, True: 8}


class Printing(RunCallbacks):
    """Callbacks that print all that they are called with."""

    def _print(self, event: CallbackEvent) -> None:
        print("called:", event)  # noqa: T201

    on_submitted = on_provisioning = on_running = on_log_lines = on_metric = on_ended = _print


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)


def xcoms_of(dag_id: str) -> dict[str, Any]:
    with create_session() as session:
        rows = session.execute(select(XComModel.key, XComModel.value).where(XComModel.dag_id == dag_id))
        return {row.key: row.value for row in rows}


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_failed_run_links_to_the_ui_alone(
    dag_runner: DagRunner,
    server: LocalServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    deferrable: bool,
) -> None:
    connect(server, monkeypatch, None, ui_url=f"{UI}/")
    commands = [f"sleep {SECONDS[deferrable]}; exit 3"]
    ended = dag_runner.run(
        f"configuration={{'type': 'task', 'commands': {commands}}}, poll_interval=0.2, deferrable={deferrable}, "
        f"debug_on_failure='1s', callbacks='{__name__}.Printing'"
    )
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert ("Pausing task as DEFERRED" in output) is deferrable
    (run,) = runs_of(server, ended.marker)
    page = f"{UI}/projects/{server.project}/runs/{run.id}"
    xcoms = xcoms_of(ended.marker.split(":")[1].rstrip("/"))
    shown = {value.strip('"') for value in xcoms.values() if isinstance(value, str)}
    assert {page, f"{page}/logs", f"{page}/metrics"} <= shown
    assert page in output
    assert "called:" in output
    lines = [line for line in output.splitlines() if server.url.removeprefix("http://") in line]
    # The embedded server logs its own start.
    assert not [line for line in lines if "uvicorn" not in line], lines
    assert server.url not in json.dumps(xcoms)


def test_the_log_has_the_address_of_a_service_for_browsers(
    dag_runner: DagRunner,
    server: LocalServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    connect(server, monkeypatch, None, ui_url=UI)
    ran = dag_runner.run_tasks(
        f"serve = {service(free_port())}\n"
        "stop = DstackStopRunOperator(task_id='stop', runs_of=serve, poll_interval=0.3)\n"
        "serve >> stop"
    )
    (run,) = runs_of(server, f"airflow:{ran.dag_id}/")
    # The value is for the tasks behind it, which run on workers.
    assert ran.values["serve"] == run.service_url
    assert run.service_url is not None
    link = run.service_url.replace(server.url, UI)
    assert f"answers at {link}" in capfd.readouterr().out
    assert link in str(xcoms_of(ran.dag_id).values())
