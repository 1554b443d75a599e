"""The trigger alone: its one event, its stop, and what cancels it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import pytest

from airflow_provider_dstack import _stop, _threads, triggers
from dstack_core import clock
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for
from tests.provider_airflow.triggering import killed, payloads, submitted, trigger_for


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let a test set Airflow's answer for the state of the task."""
    answer: dict[str, Any] = {"state": "failed", "delay": 0.0}

    def task_state(ti: object) -> str | None:
        time.sleep(answer["delay"])
        if isinstance(answer["state"], Exception):
            raise answer["state"]
        found: str | None = answer["state"]
        return found

    monkeypatch.setattr(_stop, "task_state", task_state)
    return answer


def test_serialization_is_json_and_holds_no_secret(server: LocalServer) -> None:
    run = submitted(server, "true")
    path, arguments = trigger_for(run, tail=["x"], deadline=12.5).serialize()
    assert json.loads(json.dumps(arguments)) == arguments
    assert server.token not in json.dumps(arguments)
    module, _, name = path.rpartition(".")
    again = getattr(__import__(module, fromlist=[name]), name)(**arguments)
    assert again.serialize() == (path, arguments)


def test_one_event_reports_how_the_run_ended(server: LocalServer) -> None:
    run = submitted(server, "echo one; echo two; exit 3")
    (payload,) = asyncio.run(payloads(trigger_for(run, tail=["zero"])))
    assert payload["kind"] == "finished"
    assert payload["outcome"]["exit_status"] == 3
    assert payload["tail"] == ["zero", "one", "two"]


@pytest.mark.parametrize(("ahead", "least", "most"), [(60.0, 10, 10), (-5.0, 0, 0), (9.5, 0.01, 9.5)])
def test_the_event_waits_until_the_scheduler_knows_of_the_deferral(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, ahead: float, least: float, most: float
) -> None:
    slept: list[float] = []
    real = clock.asleep

    async def asleep(seconds: float) -> None:
        # The client sleeps, too, where the machine is slow.
        if sys._getframe(1).f_globals["__name__"] == triggers.__name__:
            slept.append(seconds)
        await real(0 if seconds > 1 else seconds)

    run = submitted(server, "true")
    run.wait(30, poll_interval=0.1)
    monkeypatch.setattr(clock, "asleep", asleep)
    asyncio.run(payloads(trigger_for(run, not_before=time.time() + ahead)))
    assert len(slept) == 1
    assert least <= slept[0] <= most


def test_lines_that_were_relayed_are_not_repeated(server: LocalServer) -> None:
    run = submitted(server, "echo one; sleep 1; echo two")
    progress = None
    for event in run.follow(poll_interval=0.1):
        progress = event.progress
        if progress.cursors:
            break
    assert progress is not None
    (payload,) = asyncio.run(payloads(trigger_for(run, progress=progress.to_dict())))
    assert payload["tail"] == ["two"]


def test_a_passed_deadline_stops_the_run(server: LocalServer) -> None:
    run = submitted(server, "sleep 600")
    (payload,) = asyncio.run(payloads(trigger_for(run, deadline=time.time() + 1)))
    assert payload == {"kind": "timed_out", "stopped": True}
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_an_unreachable_server_is_one_event_too(server: LocalServer) -> None:
    run = submitted(server, "sleep 600")
    server.faults.add("/runs/get", times=None, status=503)
    (payload,) = asyncio.run(payloads(trigger_for(run, retry_budget=0.5)))
    assert (payload["kind"], payload["error"]) == ("broken", "DstackServerUnreachable")
    assert paths(server, "/runs/stop") == []


def test_a_missing_connection_is_one_event_too(server: LocalServer, database: object) -> None:
    run = submitted(server, "true")
    (payload,) = asyncio.run(payloads(trigger_for(run, dstack_conn_id="nobody")))
    assert (payload["kind"], payload["error"]) == ("broken", "AirflowFailException")


@pytest.mark.parametrize("answer", ["failed", "success", None, "running", RuntimeError("no answer")])
def test_a_kill_stops_the_run_although_it_is_cancelled_again(
    server: LocalServer, state: dict[str, Any], answer: Any
) -> None:
    state.update(state=answer, delay=1.0)
    run = submitted(server, "sleep 600")
    asyncio.run(killed(trigger_for(run), lambda: len(paths(server, "/runs/get")) > 3))
    assert len(paths(server, "/runs/stop")) == 1
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)
    assert not _threads._CALLS


def test_a_task_that_is_still_deferred_keeps_its_run(server: LocalServer, state: dict[str, Any]) -> None:
    state["state"] = "deferred"
    run = submitted(server, "sleep 600")
    asyncio.run(killed(trigger_for(run), lambda: len(paths(server, "/runs/get")) > 3))
    assert paths(server, "/runs/stop") == []
    assert run.refresh().outcome() is None


def test_keep_means_keep_and_is_logged(
    server: LocalServer, state: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted(server, "sleep 600")
    trigger = trigger_for(run, on_kill_action="keep")
    asyncio.run(killed(trigger, lambda: len(paths(server, "/runs/get")) > 3))
    assert paths(server, "/runs/stop") == []
    assert (
        f"Run {run.name} keeps running: on_kill_action is 'keep'. Its page: {run.url}"
        in capsys.readouterr().out
    )


def test_a_passed_deadline_keeps_the_run_and_logs_it(
    server: LocalServer, state: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted(server, "sleep 600")
    trigger = trigger_for(run, on_kill_action="keep", deadline=time.time())
    (payload,) = asyncio.run(payloads(trigger))
    assert payload["kind"] == "timed_out"
    assert paths(server, "/runs/stop") == []
    assert (
        f"Run {run.name} keeps running: on_kill_action is 'keep'. Its page: {run.url}"
        in capsys.readouterr().out
    )


def test_a_trigger_that_fired_stops_nothing(server: LocalServer, state: dict[str, Any]) -> None:
    run = submitted(server, "true")

    async def fire_then_kill() -> None:
        trigger = trigger_for(run)
        await payloads(trigger)
        await trigger.on_kill()

    asyncio.run(fire_then_kill())
    assert paths(server, "/runs/stop") == []


def test_a_triggers_stop_outlasts_a_server_that_fails_for_a_while(
    server: LocalServer, state: dict[str, Any]
) -> None:
    run = submitted(server, "sleep 600")
    server.faults.add("/runs/stop", times=4, status=500)
    asyncio.run(killed(trigger_for(run), lambda: len(paths(server, "/runs/get")) > 3))
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_shutdown_stops_nothing(server: LocalServer, state: dict[str, Any]) -> None:
    state["state"] = "deferred"
    run = submitted(server, "sleep 600")

    async def shut_down() -> None:
        trigger = trigger_for(run)
        task = asyncio.create_task(payloads(trigger))
        await asyncio.to_thread(wait_for, "polls", lambda: len(paths(server, "/runs/get")) > 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await trigger.cleanup()

    asyncio.run(shut_down())
    assert paths(server, "/runs/stop") == []


@pytest.mark.parametrize(
    ("answer", "stops"), [("deferred", 0), ("failed", 1), (None, 1), (RuntimeError("no answer"), 0)]
)
def test_an_airflow_without_on_kill_stops_in_cleanup(
    server: LocalServer, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch, answer: Any, stops: int
) -> None:
    monkeypatch.setattr(triggers, "trigger_has_on_kill", lambda: False)
    state["state"] = answer
    run = submitted(server, "sleep 600")
    asyncio.run(trigger_for(run).cleanup())
    assert len(paths(server, "/runs/stop")) == stops


def test_a_trigger_that_the_first_version_deferred_is_read() -> None:
    """Only what every version has serialized; the other arguments get their defaults."""
    first: dict[str, Any] = {
        "dstack_conn_id": "dstack",
        "project_name": None,
        "run_name": "run",
        "marker": "a",
        "progress": {},
    }
    _, arguments = triggers.DstackRunTrigger(**first).serialize()
    assert {name: arguments[name] for name in first} == first
    assert triggers.DstackRunTrigger(**arguments).serialize()[1] == arguments
