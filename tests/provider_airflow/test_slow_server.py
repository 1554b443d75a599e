"""A server whose every reply is late: what a task shows of its run is there once, and in order."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import pytest

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import CallbackEvent
from dstack_core.local import LocalServer
from tests.provider_airflow.support import connection_json
from tests.provider_airflow.test_callbacks import JOURNAL, METRIC, Journal, again, kinds, lines
from tests.provider_airflow.test_deferral import deferred
from tests.provider_airflow.test_operator import CONTEXT
from tests.provider_airflow.test_results import MODES, RESULT, writing
from tests.provider_airflow.triggering import payloads

# Seconds that each reply takes.
_SLOW = 1.0


@pytest.fixture(autouse=True)
def events() -> list[CallbackEvent]:
    Journal.events.clear()
    return Journal.events


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Run a slow server that measures often; values of short runs are read too."""
    monkeypatch.setattr("dstack_core._flow.utilization._SHORTEST_RUN", 0.0)
    monkeypatch.setattr("airflow_provider_dstack.operators._SYNC_SECONDS", 0.5)
    with LocalServer(metrics_seconds=0.1, gpu_usage=(31, 11)) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        server.faults.slow(_SLOW)
        yield server


def task_of(*commands: str, is_deferrable: bool) -> DstackRunOperator:
    return DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": list(commands), "resources": {"gpu": 1}},
        deferrable=is_deferrable,
        callbacks=JOURNAL,
        poll_interval=0.3,
    )


@MODES
def test_what_a_run_shows_is_there_once_on_a_slow_server(
    slow: LocalServer, events: list[CallbackEvent], capsys: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    commands = ["echo one; sleep 6; echo two", METRIC, writing(RESULT)]
    task = task_of(*commands, is_deferrable=deferrable)
    if deferrable:
        (payload,) = asyncio.run(payloads(again(deferred(task).trigger)))
        resumed = task_of(*commands, is_deferrable=True)
        outcome = resumed.execute_complete(CONTEXT, json.loads(json.dumps(payload)))
    else:
        outcome = task.execute(CONTEXT)
    assert (outcome["result"], outcome["metrics"]) == (RESULT, {"loss": 0.5})
    assert outcome["utilization"]["gpu_mean"] == 31.0
    assert (kinds(events)[0], kinds(events)[-1]) == ("submitted", "ended")
    for kind in ("submitted", "running", "metric", "ended"):
        assert kinds(events).count(kind) == 1
    assert lines(events) == ["one", "two"]
    shown = capsys.readouterr().out
    assert len(re.findall(r"Run \S+ finished, .* USD", shown)) == 1
    assert shown.count("used GPU 31 % mean, 31 % max; 11 of 80 GB; CPU") == 1
    asked = [request.path for request in slow.requests]
    assert sum(path.endswith("/runs/apply") for path in asked) == 1
    assert sum("/metrics/job/" in path for path in asked) == 1
    # A follower waits for each reply: its requests do not pile up.
    assert len(asked) < 40
