"""A deferred task, whatever happens to it or to its triggerer: one run, each line once, no wrong stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstack_core import Run
from dstack_core.local import LocalServer
from tests.callback_journal import calls, lines_of
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import paths, runs_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

_STOP_SECONDS = 5.0


class Deferred:
    """A deferred task whose run prints ``before-1`` to ``before-40``, waits, prints ``after-...``."""

    def __init__(self, components: Components, server: LocalServer, gate: Path, dag_id: str) -> None:
        self.components = components
        self.server = server
        self.gate = gate
        self.dag_id = dag_id
        # NUL among the last lines, which travel through the database: Postgres refuses it.
        # A message beside each line: it is delivered like the lines, and never shown as one.
        message = """echo '::dstack::{{"kind":"metric","{0}":'$i'}}'"""
        nul = r"[ $i = 35 ] && printf 'nul \000 byte\n'"
        lines = f"for i in $(seq 1 40); do echo {{0}}-$i; {message}; {nul}; done"
        command = f"{lines.format('before')}; until [ -e {gate} ]; do sleep 0.1; done; {lines.format('after')}; true"
        self.dag_run = components.trigger(dag_id, command=command)
        self.stops_before = self.stops()
        components.wait_for_state(dag_id, self.dag_run, "deferred")
        self.wait_until_kept("before-40")
        (self.run,) = self.runs()
        # Until a triggerer has the trigger, there is no process to notify of anything.
        self.wait_for_polls()

    def runs(self) -> list[Run]:
        return runs_of(self.server, f"airflow:{self.dag_id}/{self.dag_run}/")

    def stops(self) -> int:
        return len(paths(self.server, "/runs/stop"))

    def wait_until_kept(self, line: str) -> Any:
        """Return what the trigger has saved, once its last line is ``line``."""

        def look() -> Any:
            kept = self.components.xcom(self.dag_id, self.dag_run, "dstack_progress")
            return kept if kept and kept["tail"][-1:] == [line] else None

        return wait_for(f"checkpoint behind {line}", look)

    def polls(self) -> int:
        return len(paths(self.server, "/runs/get")) + len(paths(self.server, "/runs/list"))

    def wait_for_polls(self) -> None:
        number = self.polls()
        wait_for("polls by the trigger", lambda: self.polls() > number + 2)

    def finish(self) -> None:
        """Let the run end, and compare what it did with what Airflow shows."""
        self.gate.touch()
        self.components.wait_for_state(self.dag_id, self.dag_run, "success", seconds=120)
        assert self.stops() == self.stops_before
        assert [run.id for run in self.runs()] == [self.run.id]
        steps = [f"{part}-{i}" for part in ("before", "after") for i in range(1, 41)]
        lines = self.components.log_lines(self.dag_id, self.dag_run)
        assert [line for line in lines if line.startswith(("before-", "after-"))] == steps
        assert [line for line in lines if "::dstack" in line] == []
        result = self.components.result(self.dag_id, self.dag_run)
        assert (result["status"], result["metrics"]) == ("done", {"before": 40.0, "after": 40.0})
        metrics = self.components.xcom(self.dag_id, self.dag_run, "dstack_metrics")
        assert {name: one["value"] for name, one in metrics.items()} == result["metrics"]
        assert self.components.xcom(self.dag_id, self.dag_run, "dstack_progress") is None
        if self.dag_id == "deferred":
            self.check_calls(steps)

    def check_calls(self, steps: list[str]) -> None:
        """Assert that no callback was called twice: the position was saved before anything happened."""
        found = calls(self.components.home / "callbacks", self.run.name)
        kinds = [one.kind for one in found]
        assert [line for line in lines_of(found) if line in steps] == steps
        assert (kinds[0], kinds[-1]) == ("submitted", "ended")
        assert all(kinds.count(kind) == 1 for kind in ("submitted", "running", "ended")), kinds
        assert kinds.count("metric") == len(steps)
        # The worker's, the triggerers', the resumed worker's.
        assert len({one.process for one in found}) >= 3

    def assert_stopped_since(self, moment: float) -> None:
        """Assert that a stop request was sent soon after ``moment``, and that the run ends."""

        def stopped() -> list[float]:
            asked = [item.time for item in self.server.requests if item.path.endswith("/runs/stop")]
            return [when for when in asked if when >= moment]

        (first, *_) = wait_for("request to stop", stopped, 30)
        assert first - moment < _STOP_SECONDS
        wait_for("end of the run", lambda: self.run.refresh().outcome(), 30)
        assert self.run.raw_status == "terminated"


@pytest.fixture
def deferred(components: Components, shared_server: LocalServer, tmp_path: Path) -> Deferred:
    return Deferred(components, shared_server, tmp_path / "gate", "deferred")


@pytest.fixture
def second_triggerer(components: Components) -> Iterator[Callable[[], None]]:
    """Return a function that starts another triggerer, which ends with the test; the first keeps running."""
    yield lambda: components.start_one("triggerer-2")
    components.end_one("triggerer-2")


def fail_task(one: Deferred) -> None:
    one.components.set_state(one.dag_id, one.dag_run, "failed")


def pass_task(one: Deferred) -> None:
    one.components.set_state(one.dag_id, one.dag_run, "success")


def fail_dag_run(one: Deferred) -> None:
    one.components.set_run_state(one.dag_id, one.dag_run, "failed")


@pytest.mark.parametrize(
    ("act", "state"), [(fail_task, "failed"), (pass_task, "success"), (fail_dag_run, "failed")]
)
def test_a_user_who_ends_the_task_stops_the_run(
    deferred: Deferred, act: Callable[[Deferred], None], state: str
) -> None:
    moment = time.monotonic()
    act(deferred)
    deferred.assert_stopped_since(moment)
    assert len(deferred.runs()) == 1
    task = deferred.components.task(deferred.dag_id, deferred.dag_run)
    # A DAG run that is marked failed leaves its unfinished tasks skipped.
    assert task["state"] in (state, "skipped")


def test_a_cleared_task_stops_its_run_and_the_next_try_keeps_its_own(deferred: Deferred) -> None:
    moment = time.monotonic()
    deferred.components.clear(deferred.dag_id, deferred.dag_run)
    deferred.assert_stopped_since(moment)

    def second() -> Run | None:
        newest = deferred.runs()[0]
        return newest if newest.id != deferred.run.id else None

    run = wait_for("run of the second try", second)
    deferred.components.wait_for_state(deferred.dag_id, deferred.dag_run, "deferred")
    deferred.wait_for_polls()
    deferred.gate.touch()
    deferred.components.wait_for_state(deferred.dag_id, deferred.dag_run, "success")
    assert run.refresh().raw_status == "done"
    assert len(deferred.runs()) == 2
    lines = deferred.components.log_lines(deferred.dag_id, deferred.dag_run, attempt=2)
    steps = [line for line in lines if line.startswith(("before-", "after-"))]
    assert steps == [f"{part}-{i}" for part in ("before", "after") for i in range(1, 41)]


def test_a_restarted_triggerer_stops_nothing_and_repeats_nothing(deferred: Deferred) -> None:
    deferred.components.end_one("triggerer")
    deferred.components.start_one("triggerer")
    deferred.wait_for_polls()
    deferred.finish()


def test_a_killed_triggerer_stops_nothing_and_repeats_nothing(deferred: Deferred) -> None:
    deferred.components.signal_one("triggerer", signal.SIGKILL)
    deferred.components.end_one("triggerer")
    deferred.components.start_one("triggerer")
    deferred.wait_for_polls()
    deferred.finish()


def test_a_crash_of_the_process_that_runs_the_triggers_stops_nothing(deferred: Deferred) -> None:
    supervisor = deferred.components.pid_of("triggerer")
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(supervisor)],
        check=True,
        capture_output=True,
        text=True,
    )
    # The other child serves logs; its arguments show that.
    (runner,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "airflow triggerer" in line]
    os.kill(runner, signal.SIGKILL)
    wait_for("end of the triggerer", lambda: not deferred.components.is_alive("triggerer"), 60)
    deferred.components.end_one("triggerer")
    deferred.components.start_one("triggerer")
    deferred.wait_for_polls()
    deferred.finish()


def test_a_take_over_stops_nothing_and_repeats_nothing(
    deferred: Deferred, second_triggerer: Callable[[], None]
) -> None:
    components = deferred.components
    owner = components.task(deferred.dag_id, deferred.dag_run)["triggerer_job"]["id"]
    components.signal_one("triggerer", signal.SIGSTOP)
    try:
        second_triggerer()

        def taken_over() -> bool:
            job = components.task(deferred.dag_id, deferred.dag_run)["triggerer_job"]
            return bool(job) and job["id"] != owner

        wait_for("take-over", taken_over, 120)
        deferred.wait_for_polls()
    finally:
        components.signal_one("triggerer", signal.SIGCONT)
    wait_for(
        "word of the first triggerer that it lets go",
        lambda: "in another triggerer" in str(components.log(deferred.dag_id, deferred.dag_run)),
    )
    deferred.finish()


def test_execution_timeout_ends_a_deferred_run_on_time(
    components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    one = Deferred(components, shared_server, tmp_path / "gate", "deferred_deadline")
    task = components.wait_for_state(one.dag_id, one.dag_run, "failed")
    wait_for("end of the run", lambda: one.run.refresh().outcome(), 30)
    assert one.run.raw_status == "terminated"
    assert one.stops() == one.stops_before + 1
    assert len(one.runs()) == 1
    lines = components.log_lines(one.dag_id, one.dag_run)
    assert [line for line in lines if line.startswith("before-")] == [f"before-{i}" for i in range(1, 41)]
    assert any("execution_timeout" in line for line in lines), task


def test_values_of_env_are_hidden_in_the_triggerer_log(
    components: Components, shared_server: LocalServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    command = f"until [ -e {gate} ]; do sleep 0.1; done; echo the word is $MAGIC_TOKEN; sleep 15"
    dag_run = components.trigger("deferred", command=command)
    components.wait_for_state("deferred", dag_run, "deferred")
    gate.touch()
    components.wait_for_state("deferred", dag_run, "success")
    lines = components.log_lines("deferred", dag_run)
    assert "the word is ***" in lines
    assert not any("open-sesame" in line for line in lines)
