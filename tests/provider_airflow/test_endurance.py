"""Many executions in one process leave no file descriptor, thread, process or temporary file."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import operators
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Task
from dstack_core.local import LocalServer
from tests.faults.leftovers import Held, assert_nothing_is_left
from tests.provider_airflow.versions import TaskDeferred

COUNTS = pytest.mark.parametrize(
    "count", [15, pytest.param(200, marks=[pytest.mark.endurance, pytest.mark.timeout(1200)])]
)


def execute(server: LocalServer, number: int, *, deferrable: bool) -> Any:
    """Execute the operator, its trigger too where it defers; return the result."""
    operator = DstackRunOperator(
        task_id=f"train_{number}",
        configuration=Task(commands=["seq 1 20"]),
        dstack_conn_id="endurance",
        poll_interval=0.1,
        deferrable=deferrable,
        durable=False,
    )
    names = {"dag_id": "d", "run_id": "r", "task_id": f"train_{number}", "map_index": -1, "id": str(number)}
    context: Any = {"ti": SimpleNamespace(**names, try_number=1, max_tries=0)}
    try:
        return operator.execute(context)
    except TaskDeferred as deferral:
        trigger: Any = deferral.trigger
        trigger.not_before = 0.0

        async def event() -> Any:
            return (await anext(trigger.run())).payload

        return operator.execute_complete(context, asyncio.run(event()))


@COUNTS
@pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
def test_many_executions_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deferrable: bool, count: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 0.0)
    with LocalServer(step_seconds=0.0) as server:
        connection = {
            "conn_type": "dstack", "host": server.url, "login": server.project, "password": server.token,
        }  # fmt: skip
        monkeypatch.setenv("AIRFLOW_CONN_ENDURANCE", json.dumps(connection))
        for number in range(3):
            execute(server, number, deferrable=deferrable)
        before = Held.now()
        for number in range(3, 3 + count):
            assert execute(server, number, deferrable=deferrable)["status"] == "done"
        assert_nothing_is_left(before)
