"""Services that are waited for in the triggerer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import requests

from airflow_provider_dstack import operators
from airflow_provider_dstack.errors import DstackRunFailed, DstackRunInterrupted
from airflow_provider_dstack.service_trigger import READY, DstackServiceTrigger
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core import Run
from dstack_core.local import LocalServer
from tests.ports import free_port
from tests.provider_airflow.support import DagRunner, over, paths, runs_of, wait_for
from tests.provider_airflow.test_deferral import deferred
from tests.provider_airflow.test_operator import CONTEXT, TI
from tests.provider_airflow.test_services import service
from tests.provider_airflow.triggering import killed, payloads, trigger_for

# It answers once the task has been deferred.
_LATE = "sleep 3; echo loaded; exec python3 -m http.server {port} --bind 127.0.0.1"


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 0.5)


def operator(port: int, command: str = _LATE, **options: Any) -> DstackServiceOperator:
    return DstackServiceOperator(
        task_id="train",
        configuration={"type": "service", "port": port, "commands": [command.format(port=port)]},
        deferrable=True,
        poll_interval=0.3,
        **options,
    )


def event_of(task: DstackServiceOperator) -> dict[str, Any]:
    """Defer the task, and return the event of its trigger, made again as another process makes it."""
    path, arguments = deferred(task).trigger.serialize()
    assert path == f"{DstackServiceTrigger.__module__}.DstackServiceTrigger"
    (payload,) = asyncio.run(payloads(DstackServiceTrigger(**arguments)))
    return dict(payload)


def run_of_task(server: LocalServer) -> Run:
    (run,) = runs_of(server, f"airflow:{TI.dag_id}/")
    return run


def test_a_deferred_service_answers_and_is_stopped_by_its_teardown(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    ran = dag_runner.run_tasks(
        f"serve = {service(port, _LATE, deferrable=True)}\n"
        "stop = DstackStopRunOperator(task_id='stop', runs_of=serve, poll_interval=0.3)\n"
        "stop.as_teardown(setups=serve)"
    )
    assert ran.tasks == {"serve": "success", "stop": "success"}
    (run,) = runs_of(server, f"airflow:{ran.dag_id}/")
    assert ran.values["serve"] == run.service_url
    assert ran.values["stop"] == {run.name: "terminated"}
    output = capfd.readouterr().out
    assert output.count(f"Service {run.name} answers at ") == 1
    assert "deferred" in output.lower()


def test_the_task_ends_with_the_answer_and_the_service_keeps_running(server: LocalServer) -> None:
    task = operator(free_port())
    event = event_of(task)
    url = task.execute_complete(CONTEXT, event)
    run = run_of_task(server)
    assert (event["kind"], event["run_name"], url) == (READY, run.name, run.service_url)
    reply = requests.get(url, headers={"Authorization": f"Bearer {server.token}"}, timeout=10)
    assert (reply.status_code, run.raw_status) == (200, "running")
    assert paths(server, "/runs/stop") == []


def test_a_quick_service_is_not_deferred(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 60.0)
    task = operator(free_port(), "exec python3 -m http.server {port} --bind 127.0.0.1")
    assert task.execute(CONTEXT) == run_of_task(server).service_url


@pytest.mark.parametrize(("command", "error"), [("sleep 2", "before it answered"), ("sleep 2; exit 3", "3")])
def test_a_service_that_ends_before_it_answers_fails_the_task(
    server: LocalServer, command: str, error: str
) -> None:
    task = operator(free_port(), command)
    event = event_of(task)
    assert event["kind"] == "finished"
    with pytest.raises(DstackRunFailed, match=error):
        task.execute_complete(CONTEXT, event)


def test_a_passed_deadline_stops_a_service_that_does_not_answer(server: LocalServer) -> None:
    trigger = deferred(operator(free_port(), "sleep 600")).trigger
    trigger.deadline = time.time() + 1
    (payload,) = asyncio.run(payloads(trigger))
    assert payload == {"kind": "timed_out", "stopped": True}
    assert over(run_of_task(server)).raw_status == "terminated"


def test_an_unreachable_server_is_reported_by_the_follower(server: LocalServer) -> None:
    trigger = deferred(operator(free_port(), "sleep 600")).trigger
    trigger.retry_budget = 0.5
    server.faults.add("/runs/get", times=None, status=503)
    (payload,) = asyncio.run(payloads(trigger))
    assert (payload["kind"], payload["error"]) == ("broken", "DstackServerUnreachable")


def test_a_task_is_followed_to_its_end(server: LocalServer) -> None:
    run = server.client().runs.submit({"type": "task", "commands": ["sleep 1"]}, "deferred", marker="ours")
    trigger = DstackServiceTrigger(**trigger_for(run).serialize()[1])
    (payload,) = asyncio.run(payloads(trigger))
    assert payload["kind"] == "finished"


@pytest.mark.usefixtures("ended_by_a_user")
def test_a_kill_while_the_task_resumes_stops_the_service(server: LocalServer) -> None:
    task = operator(free_port())
    event = event_of(task)
    task._killed = True
    with pytest.raises(DstackRunInterrupted, match="began to answer"):
        task.execute_complete(CONTEXT, event)
    run = run_of_task(server)
    wait_for("end of the service", lambda: run.refresh().outcome(), 30)


def test_a_kill_while_it_is_deferred_stops_the_service(server: LocalServer, ended_by_a_user: object) -> None:
    trigger = deferred(operator(free_port(), "sleep 600")).trigger

    asyncio.run(killed(trigger, lambda: trigger._hidden))
    assert over(run_of_task(server)).raw_status == "terminated"
