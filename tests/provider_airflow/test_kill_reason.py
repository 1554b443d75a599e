"""Every row of the table in ``_kill_reason.py``, with a server on loopback in place of Airflow's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse

from airflow_provider_dstack import _from_operator, _kill_reason
from airflow_provider_dstack._compat import AirflowRuntimeError
from airflow_provider_dstack._kill_reason import Health, KillReason, airflow_health, kill_reason
from airflow_provider_dstack._previous_try import RECORD_KEY
from airflow_provider_dstack.operators import DstackRunOperator
from tests.ports import free_port
from tests.provider_airflow.health_server import (
    EXECUTION,
    HEALTHY,
    NO_DATABASE,
    PUBLIC,
    HealthServer,
    health_server,
)
from tests.provider_airflow.test_operator import TI

_LIMIT = 4.5  # seconds: 3 s, and what a busy machine adds


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    """Serve a healthy Airflow, and name it in the worker's configuration."""
    with health_server() as server:
        server.replies = {PUBLIC: (200, HEALTHY), EXECUTION: (200, {"status": "healthy"})}
        configure(monkeypatch, server.url)
        yield server


@pytest.fixture
def silence() -> Iterator[Callable[[], str]]:
    """Return a request for the state that gets no answer until the test has ended."""
    over = threading.Event()

    def ask() -> str:
        over.wait(60)
        return "running"

    yield ask
    over.set()


def configure(monkeypatch: pytest.MonkeyPatch, root: str | None, base_url: str | None = None) -> None:
    for name, value in (
        ("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", root and f"{root}/execution/"),
        ("AIRFLOW__API__BASE_URL", base_url),
    ):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def answer(state: str | None, after: float = 0.0) -> Callable[[], str | None]:
    def ask() -> str | None:
        time.sleep(after)
        return state

    return ask


def failing(error: Exception) -> Callable[[], str | None]:
    def ask() -> str | None:
        raise error

    return ask


def timed(
    ask_state: Callable[[], str | None], ask_health: Callable[[], Health] | None = None
) -> tuple[KillReason, float]:
    started = time.monotonic()
    reason = kill_reason(ask_state, ask_health)
    return reason, time.monotonic() - started


@pytest.mark.parametrize("state", ["failed", "success", "restarting", "skipped", "removed"])
def test_a_task_that_a_user_ended_was_ended(airflow: HealthServer, state: str) -> None:
    assert kill_reason(answer(state)) == KillReason("ended", f"the task's state is {state}")


def test_a_task_that_still_runs_leaves_its_worker(airflow: HealthServer) -> None:
    assert kill_reason(answer("running")) == KillReason("worker_leaving", "the task's state is running")


@pytest.mark.parametrize("state", ["up_for_retry", "scheduled", "queued", None])
def test_a_task_that_is_to_run_again_was_given_to_a_new_try(airflow: HealthServer, state: str | None) -> None:
    assert kill_reason(answer(state)) == KillReason("replaced", f"the task's state is {state}")


def test_a_state_that_comes_late_decides_although_airflow_is_healthy(airflow: HealthServer) -> None:
    assert kill_reason(answer("running", after=1.0)).kind == "worker_leaving"


@pytest.mark.parametrize("delay", [1.5, 2.5])
def test_a_slow_airflow_is_waited_for(airflow: HealthServer, delay: float) -> None:
    airflow.delay = delay
    reason, seconds = timed(answer("failed", after=delay))
    assert reason.kind == "ended"
    assert seconds < _LIMIT


def test_no_state_from_a_healthy_airflow_indicates_a_user(
    airflow: HealthServer, silence: Callable[[], str]
) -> None:
    reason, seconds = timed(silence)
    assert reason == KillReason("ended", "the state of the task is unknown, and it is healthy")
    assert 1.9 < seconds < _LIMIT


def test_a_refused_connection_indicates_an_outage(
    monkeypatch: pytest.MonkeyPatch, silence: Callable[[], str]
) -> None:
    configure(monkeypatch, f"http://127.0.0.1:{free_port()}")
    reason, seconds = timed(silence)
    assert reason == KillReason("unreachable", "Connection refused")
    assert seconds < _LIMIT


def test_without_a_connection_the_supervisor_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, f"http://127.0.0.1:{free_port()}")
    asked = threading.Event()

    def ask() -> str:
        asked.set()
        return "failed"

    assert kill_reason(ask).kind == "unreachable"
    assert not asked.is_set()


def test_a_connection_that_is_refused_once_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    configure(monkeypatch, f"http://127.0.0.1:{port}")
    refused = threading.Event()

    def seen(error: Exception) -> str:
        refused.set()
        return "Connection refused"

    monkeypatch.setattr(_kill_reason, "_in_short", seen)
    monkeypatch.setattr(_kill_reason, "_REFUSED_TWICE_SECONDS", 2.0)
    health: list[Health] = []
    thread = threading.Thread(target=lambda: health.append(airflow_health()))
    thread.start()
    assert refused.wait(30)
    with health_server(port) as server:
        server.replies = {PUBLIC: (200, HEALTHY)}
        thread.join()
    assert health == [Health("up", "it is healthy")]


def test_a_failed_health_check_alone_is_inconclusive(airflow: HealthServer) -> None:
    airflow.replies[PUBLIC] = (503, "")
    assert kill_reason(answer("failed", after=0.1)).kind == "ended"


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_server_error_indicates_an_outage(
    airflow: HealthServer, silence: Callable[[], str], status: int
) -> None:
    airflow.replies[PUBLIC] = (status, "Bad Gateway")
    reason, seconds = timed(silence)
    assert reason == KillReason("unreachable", f"its API server answered {status}")
    assert seconds < _LIMIT


def test_an_unhealthy_database_indicates_an_outage(airflow: HealthServer, silence: Callable[[], str]) -> None:
    airflow.replies[PUBLIC] = (200, NO_DATABASE)
    assert kill_reason(silence) == KillReason("unreachable", "its database is unhealthy")


_API_SERVER_ERROR = ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"status_code": 403})


@pytest.mark.parametrize(
    "error",
    [AirflowRuntimeError(_API_SERVER_ERROR), EOFError("Request socket closed"), BrokenPipeError(32, "")],
)
def test_a_request_that_airflow_fails_to_answer_indicates_an_outage(
    airflow: HealthServer, error: Exception
) -> None:
    reason = kill_reason(failing(error))
    assert reason.kind == "unreachable"
    assert repr(error) in reason.fact


def test_a_request_that_airflow_does_not_know_is_not_an_outage(airflow: HealthServer) -> None:
    reason = kill_reason(failing(AttributeError("no get_task_states")))
    assert reason.kind == "ended"
    assert "no get_task_states" in reason.fact
    assert "healthy" in reason.fact


def test_a_server_that_accepts_and_never_answers_indicates_an_outage(
    monkeypatch: pytest.MonkeyPatch, silence: Callable[[], str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        configure(monkeypatch, f"http://127.0.0.1:{listening.getsockname()[1]}")
        reason, seconds = timed(silence)
    assert reason.kind == "unreachable"
    assert 2.9 < seconds < _LIMIT


def test_a_server_other_than_airflow_counts_as_unreachable(
    airflow: HealthServer, silence: Callable[[], str]
) -> None:
    airflow.replies = {PUBLIC: (200, "<html>Sign in</html>"), EXECUTION: (200, "<html>Sign in</html>")}
    assert kill_reason(silence) == KillReason("unreachable", "its API server answered 200 and no JSON")


def test_a_health_check_that_raises_is_inconclusive(silence: Callable[[], str]) -> None:
    def broken() -> Health:
        raise ValueError("no such option")

    assert timed(answer("failed", after=1.0), broken)[0].kind == "ended"
    assert timed(silence, broken)[0] == KillReason("unreachable", "ValueError('no such option')")


def test_an_api_server_of_the_execution_api_alone_is_up(airflow: HealthServer) -> None:
    del airflow.replies[PUBLIC]
    assert airflow_health() == Health("up", "its API server is healthy")
    assert airflow.asked == [PUBLIC, EXECUTION]


def test_the_public_api_server_shows_that_the_database_of_both_is_away(
    airflow: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    del airflow.replies[PUBLIC]
    with health_server() as public:
        configure(monkeypatch, airflow.url, public.url)
        public.replies = {PUBLIC: (200, NO_DATABASE)}
        assert airflow_health() == Health("failing", "its database is unhealthy")
        public.replies = {PUBLIC: (503, "")}
        assert airflow_health() == Health("up", "its API server is healthy")
    assert airflow_health() == Health("up", "its API server is healthy")


def test_the_address_follows_the_base_url_where_there_is_no_other(
    airflow: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, None, f"{airflow.url}/airflow/")
    airflow.replies = {f"/airflow{PUBLIC}": (200, HEALTHY)}
    assert airflow_health() == Health("up", "it is healthy")


def test_the_health_check_sends_no_token(airflow: HealthServer) -> None:
    airflow_health()
    assert airflow.asked == [PUBLIC]
    assert airflow.authorizations == []


@pytest.mark.parametrize(
    ("kind", "durable", "next_try", "words"),
    [
        ("ended", True, True, None),
        ("ended", True, False, None),
        ("ended", False, True, None),
        ("ended", False, False, None),
        ("worker_leaving", True, True, "kept for the task's next try"),
        ("worker_leaving", True, False, None),
        ("worker_leaving", False, True, None),
        ("worker_leaving", False, False, None),
        ("replaced", True, True, "kept for the task's next try"),
        ("replaced", True, False, "kept for the task's next try"),
        ("replaced", False, True, None),
        ("replaced", False, False, None),
        ("unreachable", True, True, "kept for the task's next try"),
        ("unreachable", True, False, "although this was the last try"),
        ("unreachable", False, True, None),
        ("unreachable", False, False, "although this was the last try"),
    ],
)
def test_which_runs_are_kept(kind: str, durable: bool, next_try: bool, words: str | None) -> None:
    reasons = (
        KillReason("ended", "the task's state is failed"),
        KillReason("worker_leaving", "the task's state is running"),
        KillReason("replaced", "the task's state is queued"),
        KillReason("unreachable", "Connection refused"),
    )
    (reason,) = (one for one in reasons if one.kind == kind)
    kept = reason.why_kept(durable=durable, next_try=next_try)
    assert kept is None if words is None else kept is not None and words in kept


@pytest.mark.parametrize(
    ("store", "words"),
    [
        # Airflow reads the record for the current try alone.
        ({RECORD_KEY: {"run_name": "af-1"}}, None),
        ({}, "given the task to a new try"),
        # Before Airflow 3.3 there is no store.
        (None, None),
    ],
)
def test_a_replaced_last_try_leaves_its_run_to_the_try_that_runs(
    airflow: HealthServer, monkeypatch: pytest.MonkeyPatch, store: dict[str, Any] | None, words: str | None
) -> None:
    monkeypatch.setattr(_from_operator, "task_state", lambda ti: "running")
    task = DstackRunOperator(task_id="train", configuration={"type": "task", "commands": ["true"]})
    context: Any = {"ti": SimpleNamespace(**vars(TI)), "task_state_store": store}
    why_kept = _from_operator._why_kept(task, context, _from_operator.ledger_of(task, context, "main"))
    assert why_kept is None if words is None else why_kept is not None and words in why_kept
