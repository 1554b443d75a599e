"""What a trigger does off the event loop, and what it asks Airflow."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from airflow_provider_dstack import _compat
from airflow_provider_dstack.hooks import DstackHook
from dstack_core.local import LocalServer
from tests.provider_airflow.support import over, paths
from tests.provider_airflow.triggering import killed, payloads, submitted, trigger_for


def test_nothing_that_blocks_is_done_on_the_event_loop(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[bool]] = {}

    def watched(name: str, real: Any) -> Any:
        def call(*told: Any, **more: Any) -> Any:
            on_loop = threading.current_thread() is threading.main_thread()
            used.setdefault(name, set()).add(on_loop)
            return real(*told, **more)

        return staticmethod(call)

    monkeypatch.setattr(DstackHook, "get_connection", watched("connection", DstackHook.get_connection))
    monkeypatch.setattr(_compat, "_xcom", watched("xcom", _compat._xcom).__func__)
    run = submitted(server, "echo one; sleep 1; echo two")
    (payload,) = asyncio.run(payloads(trigger_for(run)))
    assert payload["tail"] == ["one", "two"]
    assert used == {"connection": {False}, "xcom": {False}}


def test_killing_a_polling_trigger_needs_no_airflow_connection(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dstack._stop.task_state", lambda ti: "failed")
    run = submitted(server, "sleep 600")

    def polled() -> bool:
        if len(paths(server, "/runs/get")) <= 3:
            return False
        monkeypatch.setattr(DstackHook, "get_connection", _silence)
        return True

    asyncio.run(killed(trigger_for(run), polled))
    assert over(run).raw_status == "terminated"


def test_many_tasks_that_are_ended_together_do_not_wait_for_the_ends_of_their_runs(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dstack._stop.task_state", lambda ti: "failed")
    stubborn = {"type": "task", "commands": ["trap '' INT TERM; sleep 600"], "stop_duration": 120}
    with server.client() as client:
        runs = [client.runs.submit(stubborn, run_name=f"job-{number}", marker="ours") for number in range(16)]

        async def kill_all() -> None:
            await asyncio.gather(*[trigger_for(run).on_kill() for run in runs])

        asyncio.run(kill_all())
        assert len(paths(server, "/runs/stop")) == len(runs)
        for run in runs:
            run.stop(abort=True)
        for run in runs:
            over(run)


def _silence(*told: object) -> None:
    raise AssertionError("the connection was asked for")


@pytest.mark.parametrize(
    ("map_index", "key", "asked"), [(None, "train", None), (-1, "train", None), (3, "train_3", 3)]
)
def test_the_state_of_the_task_itself_is_requested(
    monkeypatch: pytest.MonkeyPatch, map_index: int | None, key: str, asked: int | None
) -> None:
    questions: list[dict[str, Any]] = []

    def states(**question: Any) -> dict[str, Any]:
        questions.append(question)
        return {"r": {key: "deferred", "train_other": "failed"}}

    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", states)
    ti: Any = SimpleNamespace(dag_id="d", run_id="r", task_id="train", map_index=map_index, try_number=1)
    assert _compat.task_state(ti) == "deferred"
    assert questions == [{"dag_id": "d", "task_ids": ["train"], "run_ids": ["r"], "map_index": asked}]


@pytest.mark.parametrize(("states", "state"), [({"r": {"train": None}}, None), ({}, "removed")])
def test_a_task_without_a_state_is_not_a_removed_one(
    monkeypatch: pytest.MonkeyPatch, states: dict[str, Any], state: str | None
) -> None:
    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", lambda **question: states)
    ti: Any = SimpleNamespace(dag_id="d", run_id="r", task_id="train", map_index=-1, try_number=1)
    assert _compat.task_state(ti) == state
