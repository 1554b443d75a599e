"""What a try leaves to the next one when it loses sight of its run, or is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import _from_operator, _kill_reason
from airflow_provider_dstack._kill_reason import Health
from airflow_provider_dstack.errors import (
    DstackError,
    DstackRunInterrupted,
    DstackServerUnreachable,
)
from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.support import over, paths, wait_for
from tests.provider_airflow.tries import Store, Tries


@pytest.fixture
def stored(server: LocalServer) -> Tries:
    return Tries(server, Store())


@pytest.mark.parametrize(("try_number", "left"), [(1, True), (3, False)], ids=["tries left", "last try"])
def test_a_task_that_cannot_reach_the_server_leaves_its_run_to_the_next_try(
    stored: Tries, try_number: int, left: bool
) -> None:
    stored.ti.try_number = try_number
    stored.server.faults.add("/logs/poll", times=None, status=503)
    with pytest.raises(DstackServerUnreachable):
        stored.execute("sleep 600", retry_budget=0.5)
    (run,) = stored.runs()
    assert (paths(stored.server, "/runs/stop") == []) is left
    if left:
        stored.server.faults.clear()
        stored.next_try()
        stored.server.client().runs.stop(run.name)
        with pytest.raises(DstackError):
            stored.execute("exit 5")
        assert len(stored.runs()) == 2


class Policy:
    """A retry policy as in Airflow 3.3."""

    def __init__(self, action: str) -> None:
        self.action = action

    def evaluate(self, **told: Any) -> Any:
        assert isinstance(told["exception"], DstackServerUnreachable)
        return SimpleNamespace(action=SimpleNamespace(value=self.action))


@pytest.mark.parametrize(("action", "left"), [("fail", False), ("retry", True), ("default", True)])
def test_a_retry_policy_is_asked_whether_there_is_a_next_try(
    stored: Tries, action: str, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Tries, "context", {**stored.context, "task": SimpleNamespace(retry_policy=Policy(action))}
    )
    stored.server.faults.add("/logs/poll", times=None, status=503)
    with pytest.raises(DstackServerUnreachable):
        stored.execute("sleep 600", retry_budget=0.5)
    assert (paths(stored.server, "/runs/stop") == []) is left


def killed_while_running(tries: Tries, monkeypatch: pytest.MonkeyPatch, state: Callable[[], Any]) -> Run:
    """Kill the task while its run is running and Airflow answers ``state`` about it; return the run."""
    monkeypatch.setattr(_from_operator, "task_state", lambda ti: state())
    monkeypatch.setattr(_kill_reason, "airflow_health", lambda: Health("up", "it is healthy"))
    operator = tries.operator("sleep 600")

    def kill() -> None:
        wait_for("running run", lambda: [one for one in tries.runs() if one.raw_status == "running"])
        operator.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DstackRunInterrupted):
        operator.execute(tries.context)
    thread.join()
    (run,) = tries.runs()
    return run


def _unknown() -> str:
    raise OSError("Airflow does not answer")


@pytest.mark.parametrize(
    "state",
    [lambda: "running", lambda: "up_for_retry", lambda: "queued", _unknown],
    ids=["running", "up_for_retry", "queued", "Airflow is away"],
)
def test_a_worker_that_shuts_down_leaves_the_run_to_the_next_try(
    stored: Tries, monkeypatch: pytest.MonkeyPatch, state: Callable[[], Any]
) -> None:
    run = killed_while_running(stored, monkeypatch, state)
    assert paths(stored.server, "/runs/stop") == []
    assert run.outcome() is None


@pytest.mark.parametrize(
    ("state", "try_number"),
    [
        (lambda: "failed", 1),
        (lambda: "success", 1),
        (lambda: "restarting", 1),
        (lambda: "removed", 1),
        (lambda: "running", 3),
    ],
    ids=["failed", "success", "cleared", "no such task", "last try"],
)
def test_a_task_that_a_user_ended_or_that_has_no_next_try_stops_its_run(
    stored: Tries, monkeypatch: pytest.MonkeyPatch, state: Callable[[], Any], try_number: int
) -> None:
    stored.ti.try_number = try_number
    run = over(killed_while_running(stored, monkeypatch, state))
    assert run.raw_status == "terminated"


def test_an_airflow_that_answers_too_late_does_not_prevent_the_stop(
    stored: Tries, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = threading.Event()
    run = killed_while_running(stored, monkeypatch, lambda: silence.wait(60) and "running")
    silence.set()
    assert len(paths(stored.server, "/runs/stop")) == 1
    assert over(run).raw_status == "terminated"
