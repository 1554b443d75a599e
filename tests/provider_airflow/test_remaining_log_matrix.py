"""A deferred task whose run ends megabytes ahead of its trigger, and the kills that come in between."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import paths, runs_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

_DAG = "retried_deferred"
# 5 MB, of which a trigger relays 0.5 MB at once and then 0.1 MB a second.
_LINES = 50_000
_LINE_BYTES = 101


class Chatty:
    """One deferred task whose run writes 5 MB, waits for the gate, and ends."""

    def __init__(self, components: Components, server: LocalServer, gate: Path) -> None:
        self.components = components
        self.server = server
        self.gate = gate
        program = f'BEGIN {{ for (i = 0; i < {_LINES}; i++) printf "line-%09d-%085d\\n", i, 0 }}'
        # A run that writes in the first seconds is relayed by the worker.
        command = f"sleep 8; awk '{program}'; until [ -e {gate} ]; do sleep 0.1; done"
        self.stops_before = len(paths(server, "/runs/stop"))
        self.dag_run = components.trigger(_DAG, command=command)
        components.wait_for_state(_DAG, self.dag_run, "deferred")
        wait_for("position that the trigger saved", self.saved)

    def saved(self) -> int:
        """Return how many bytes the trigger had relayed when it last saved its position."""
        kept = self.components.xcom(_DAG, self.dag_run, "dstack_progress")
        return int(kept["relayed_bytes"]) if kept else 0

    def runs(self) -> list[Run]:
        return runs_of(self.server, f"airflow:{_DAG}/{self.dag_run}/")

    def lines(self, attempt: int = 1) -> list[int]:
        found = self.components.log_lines(_DAG, self.dag_run, attempt)
        return [int(text.split("-")[1]) for text in found if text.startswith("line-")]

    def resumed(self) -> psutil.Process:
        """Return the process of the resumed task, once it asks for the log."""
        self.components.wait_for_state(_DAG, self.dag_run, "running", "success")
        before = len(paths(self.server, "/logs/poll"))
        wait_for("request for the log", lambda: len(paths(self.server, "/logs/poll")) > before)
        return psutil.Process(self.components.task(_DAG, self.dag_run)["pid"])

    def assert_succeeded(self) -> None:
        self.components.wait_for_state(_DAG, self.dag_run, "success")
        assert len(self.runs()) == 1
        assert len(paths(self.server, "/runs/stop")) == self.stops_before
        assert self.components.result(_DAG, self.dag_run)["status"] == "done"
        assert self.components.xcom(_DAG, self.dag_run, "dstack_progress") is None


@pytest.fixture
def chatty(components: Components, shared_server: LocalServer, tmp_path: Path) -> Chatty:
    shared_server.faults.clear()
    return Chatty(components, shared_server, tmp_path / "gate")


def test_the_worker_relays_what_the_trigger_left(chatty: Chatty) -> None:
    chatty.gate.touch()
    chatty.assert_succeeded()
    assert chatty.lines() == list(range(_LINES))
    log = chatty.components.log_lines(_DAG, chatty.dag_run)
    assert any("The worker relays the rest of its log" in text for text in log)


def test_a_triggerer_killed_before_it_relayed_the_whole_log_loses_no_line(chatty: Chatty) -> None:
    saved = chatty.saved()
    chatty.components.signal_one("triggerer", signal.SIGKILL)
    chatty.components.end_one("triggerer")
    chatty.gate.touch()
    chatty.components.start_one("triggerer")
    chatty.assert_succeeded()
    times = Counter(chatty.lines())
    assert list(times) == list(range(_LINES))
    # What was logged behind the position that was saved last is logged again, and nothing before it.
    assert all(number >= saved // _LINE_BYTES for number, count in times.items() if count > 1)
    assert max(times.values()) <= 2


def test_a_triggerer_killed_after_its_event_repeats_nothing(chatty: Chatty) -> None:
    chatty.server.faults.add("/logs/poll", times=None, delay=3.0)
    chatty.gate.touch()
    chatty.resumed()
    chatty.components.signal_one("triggerer", signal.SIGKILL)
    chatty.server.faults.clear()
    chatty.assert_succeeded()
    chatty.components.end_one("triggerer")
    chatty.components.start_one("triggerer")
    assert chatty.lines() == list(range(_LINES))


def test_a_worker_killed_during_the_rest_of_the_log_leaves_it_to_the_next_try(chatty: Chatty) -> None:
    chatty.server.faults.add("/logs/poll", times=None, delay=3.0)
    chatty.gate.touch()
    chatty.resumed().kill()
    chatty.server.faults.clear()
    chatty.assert_succeeded()
    assert chatty.components.task(_DAG, chatty.dag_run)["try_number"] == 2
    first = chatty.lines(attempt=1)
    assert first == list(range(len(first)))
    assert len(first) < _LINES
    assert chatty.lines(attempt=2) == list(range(_LINES))


def test_a_user_who_ends_the_task_during_the_rest_of_the_log_stops_nothing(chatty: Chatty) -> None:
    chatty.server.faults.add("/logs/poll", times=None, delay=3.0)
    chatty.gate.touch()
    process = chatty.resumed()
    chatty.components.set_state(_DAG, chatty.dag_run, "failed")
    wait_for("end of the task's process", lambda: not process.is_running())
    chatty.server.faults.clear()
    assert chatty.components.task(_DAG, chatty.dag_run)["state"] == "failed"
    assert len(paths(chatty.server, "/runs/stop")) == chatty.stops_before
    (run,) = chatty.runs()
    assert run.raw_status == "done"
