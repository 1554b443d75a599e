"""Every way in which a task that waits on a worker can be killed, with Airflow's real components.

Each test shows what the dstack server received (how many runs, when a stop request) and what the task's log
contains. The deferred mode has a matrix of its own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from airflow_provider_dstack._compat import trigger_has_on_kill
from dstack_core import Run
from dstack_core.local import LocalServer
from tests.callback_journal import Call, calls, count, lines_of
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import over, runs_of, wait_for
from tests.provider_airflow.test_real_components import running_run

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

# Airflow notifies the worker with its next heartbeat, which the components send every second; five more seconds
# are what a killed task has.
_STOP_SECONDS = 6.0
# With Airflow 3.3, as with a trigger's on_kill; before, the task continues undisturbed.
_SUPERVISOR_HEARS_SIGTERM = trigger_has_on_kill()
_STEPS = [f"step-{number}" for number in range(1, 7)]


class Case:
    """One DAG run with its task, the server of its runs, and a gate its command waits at."""

    def __init__(self, components: Components, server: LocalServer, gate: Path) -> None:
        self.components = components
        self.server = server
        self.gate = gate
        self.dag_id = ""
        self.run_id = ""
        self._requests_before = len(server.requests)

    @property
    def gated(self) -> str:
        """Return a command that writes three steps, waits for the gate, and writes three more."""
        message = """echo '::dstack::{"kind":"metric","number":'$i'}'"""
        first, last = (
            f"for i in {numbers}; do echo step-$i; {message}; done" for numbers in ("1 2 3", "4 5 6")
        )
        return f"{first}; until [ -e {self.gate} ]; do sleep 0.1; done; {last}"

    def start(self, dag_id: str, command: str) -> None:
        self.dag_id = dag_id
        self.run_id = self.components.trigger(dag_id, command=command)

    def running(self) -> Run:
        return running_run(self.server, self.dag_id, self.run_id)

    def runs(self) -> list[Run]:
        return runs_of(self.server, f"airflow:{self.dag_id}/{self.run_id}/")

    def asked(self, ending: str) -> list[float]:
        """Return the times of this case's requests with that path (``time.monotonic()``)."""
        requests = self.server.requests[self._requests_before :]
        return [request.time for request in requests if request.path.endswith(ending)]

    def calls(self, run: Run) -> list[Call]:
        """Return the calls of callbacks for a run, of all processes."""
        return calls(self.components.home / "callbacks", run.name)

    def log(self, attempt: int = 1) -> list[str]:
        return self.components.log_lines(self.dag_id, self.run_id, attempt)

    def steps(self, attempt: int = 1) -> list[str]:
        return [line for line in self.log(attempt) if line.startswith("step-")]

    def wait_for_step(self, step: str = "step-3", attempt: int = 1) -> None:
        def told() -> bool:
            task = self.components.task(self.dag_id, self.run_id)
            return task["try_number"] >= attempt and step in self.log(attempt)

        wait_for(f"{step} in the log of try {attempt}", told)

    def mark(self, state: str) -> float:
        self.components.set_state(self.dag_id, self.run_id, state)
        return time.monotonic()

    def clear(self) -> None:
        self.components.clear(self.dag_id, self.run_id)

    def wait(self, *states: str) -> dict[str, object]:
        return self.components.wait_for_state(self.dag_id, self.run_id, *states)

    def task_process(self) -> psutil.Process:
        pid = self.components.task(self.dag_id, self.run_id)["pid"]
        return psutil.Process(pid)

    def wait_for_stop(self, since: float) -> float:
        """Return how long after ``since`` the first stop request came (seconds)."""
        return wait_for("stop request", lambda: self.asked("/runs/stop"), 30)[0] - since

    def assert_one_run_went_on(self, run: Run) -> None:
        """Assert that the task succeeded with one run, and that no stop request was sent."""
        self.wait("success")
        assert [one.id for one in self.runs()] == [run.id]
        assert len(self.asked("/runs/apply")) == 1
        assert self.asked("/runs/stop") == []
        result = self.components.result(self.dag_id, self.run_id)
        assert (result["run_id"], result["metrics"]) == (run.id, {"number": 6.0})
        assert [line for line in self.log() if "::dstack" in line] == []


@pytest.fixture
def case(components: Components, shared_server: LocalServer, tmp_path: Path) -> Iterator[Case]:
    shared_server.faults.clear()
    yield Case(components, shared_server, tmp_path / "gate")
    shared_server.faults.clear()


@pytest.mark.parametrize("state", ["failed", "success"])
def test_marking_a_running_task_stops_its_run(
    case: Case, state: str, record_property: Callable[[str, object], None]
) -> None:
    case.start("retried", case.gated)
    run = case.running()
    case.wait_for_step()
    seconds = case.wait_for_stop(case.mark(state))
    record_property("seconds_to_stop", round(seconds, 1))
    assert seconds < _STOP_SECONDS
    assert over(run).raw_status == "terminated"
    assert len(case.runs()) == 1
    assert len(case.asked("/runs/stop")) == 1
    assert case.components.task(case.dag_id, case.run_id)["state"] == state
    assert case.steps() == _STEPS[:3]


def test_clearing_a_running_task_stops_its_run_and_starts_another(case: Case) -> None:
    case.start("retried", case.gated)
    first = case.running()
    case.clear()
    assert case.wait_for_stop(time.monotonic()) < _STOP_SECONDS
    assert over(first).raw_status == "terminated"
    wait_for("run of the new try", lambda: len(case.runs()) == 2)
    case.gate.touch()
    case.wait("success")
    newest, oldest = case.runs()
    assert oldest.id == first.id
    assert newest.raw_status == "done"
    assert case.steps(attempt=2) == _STEPS


def test_clearing_a_successful_task_starts_another_run(case: Case) -> None:
    case.start("retried", "echo step-1")
    case.wait("success")
    (first,) = case.runs()
    case.components.wait_for_run_end(case.dag_id, case.run_id)
    case.clear()
    wait_for("run of the new try", lambda: len(case.runs()) == 2)
    case.wait("success")
    assert case.components.result(case.dag_id, case.run_id)["run_id"] != first.id
    assert {run.raw_status for run in case.runs()} == {"done"}
    assert case.asked("/runs/stop") == []
    assert case.steps(attempt=2) == ["step-1"]


def test_marking_a_task_during_its_submission_stops_the_run_that_appears(case: Case) -> None:
    case.server.faults.add("/runs/apply", delay=3.0)
    case.start("retried", "sleep 600")
    wait_for("submission", lambda: case.asked("/runs/apply"))
    case.wait("running")
    seconds = case.wait_for_stop(case.mark("failed"))
    assert seconds < _STOP_SECONDS
    # The stop leaves at once, and again when the run has appeared.
    (run,) = wait_for("run that appears", case.runs)
    assert over(run).raw_status == "terminated"


def test_marking_a_task_stops_its_run_on_a_slow_server(case: Case) -> None:
    case.start("retried", "sleep 600")
    run = case.running()
    # Longer than the patience of the client, shorter than what a killed task has.
    case.server.faults.add("/runs/stop", delay=3.0)
    seconds = case.wait_for_stop(case.mark("failed"))
    assert seconds < _STOP_SECONDS
    assert over(run).raw_status == "terminated"


def test_marking_a_task_that_logs_many_lines_stops_its_run(case: Case) -> None:
    # 30 lines every 20 ms: the log is being written whenever the kill comes.
    lines = "for k in 1 2 3 4 5 6 7 8 9 10; do i=$((i+1)); echo step-$i; done"
    case.start("retried", f"i=0; while true; do {lines}; {lines}; {lines}; sleep 0.02; done")
    run = case.running()
    case.wait_for_step("step-200")
    seconds = case.wait_for_stop(case.mark("failed"))
    assert seconds < _STOP_SECONDS
    assert over(run).raw_status == "terminated"
    steps = case.steps()
    assert steps == [f"step-{number}" for number in range(1, len(steps) + 1)]


@pytest.mark.parametrize("state", ["failed", "success"])
def test_marking_the_dag_run_stops_the_run_of_its_task(case: Case, state: str) -> None:
    case.start("retried", "sleep 600")
    run = case.running()
    path = f"/api/v2/dags/{case.dag_id}/dagRuns/{case.run_id}"
    case.components.call("PATCH", path, {"state": state})
    assert case.wait_for_stop(time.monotonic()) < _STOP_SECONDS
    assert over(run).raw_status == "terminated"
    assert len(case.runs()) == 1


def test_a_retry_takes_over_the_run_of_a_killed_task_process(case: Case) -> None:
    case.start("retried", case.gated)
    run = case.running()
    case.wait_for_step()
    case.task_process().kill()
    case.wait_for_step(attempt=2)
    case.gate.touch()
    case.assert_one_run_went_on(run)
    assert case.steps(attempt=2) == _STEPS
    assert any("is taken over" in line for line in case.log(attempt=2))
    found = case.calls(run)
    first, second = [one for one in found if one.kind == "submitted"]
    assert (first.is_taken_over, second.is_taken_over) == (False, True)
    assert first.process != second.process
    # A retry follows the run from its first line.
    assert lines_of([one for one in found if one.process == first.process]) == _STEPS[:3]
    assert lines_of([one for one in found if one.process == second.process]) == _STEPS
    assert found[-1].kind == "ended"
    assert count(found, "ended") == 1


def test_a_retry_takes_the_result_of_a_run_whose_node_was_lost(case: Case) -> None:
    case.start("retried", case.gated)
    run = case.running()
    case.wait_for_step()
    task = case.task_process()
    supervisor = task.parent()
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    task.kill()
    case.gate.touch()
    over(run)
    # No process saw how the run ended; Airflow notices the missing heartbeats later.
    case.assert_one_run_went_on(run)
    assert case.steps(attempt=2) == _STEPS
    found = case.calls(run)
    assert (count(found, "submitted"), count(found, "ended")) == (2, 1)


def test_a_kill_between_the_submission_and_its_reply_makes_no_second_run(case: Case) -> None:
    late = case.server.faults.add("/runs/apply", delay=3.0)
    case.start("retried", case.gated)
    wait_for("submission", lambda: case.asked("/runs/apply"))
    case.wait("running")
    case.task_process().kill()
    run = case.running()
    case.wait_for_step(attempt=2)
    # The server refuses the request of the killed try for as long as the run is active.
    wait_for("refusal of the late submission", late.answered.is_set)
    case.gate.touch()
    case.wait("success")
    assert [one.id for one in case.runs()] == [run.id]
    assert case.asked("/runs/stop") == []
    assert case.steps(attempt=2) == _STEPS


def test_a_worker_shutdown_leaves_the_run_to_the_next_try(case: Case) -> None:
    case.start("retried", case.gated)
    run = case.running()
    case.wait_for_step()
    supervisor = case.task_process().parent()
    assert supervisor is not None
    supervisor.terminate()
    if not _SUPERVISOR_HEARS_SIGTERM:
        case.gate.touch()
        case.assert_one_run_went_on(run)
        assert case.steps() == _STEPS
        return
    case.wait_for_step(attempt=2)
    case.gate.touch()
    case.assert_one_run_went_on(run)
    assert case.steps() == _STEPS[:3]
    assert case.steps(attempt=2) == _STEPS
    assert any("is kept for the task's next try" in line for line in case.log())


def test_a_worker_shutdown_on_the_last_try_stops_the_run(case: Case) -> None:
    case.start("last_try", case.gated)
    run = case.running()
    supervisor = case.task_process().parent()
    assert supervisor is not None
    supervisor.terminate()
    if not _SUPERVISOR_HEARS_SIGTERM:
        case.gate.touch()
        case.assert_one_run_went_on(run)
        return
    assert case.wait_for_stop(time.monotonic()) < _STOP_SECONDS
    assert over(run).raw_status == "terminated"
    case.wait("failed")
    assert len(case.runs()) == 1
    # No process followed it to its end.
    assert (count(case.calls(run), "submitted"), count(case.calls(run), "ended")) == (1, 0)


def test_an_exception_on_the_last_try_stops_the_run(case: Case) -> None:
    case.start("last_try", "sleep 600")
    run = case.running()
    case.server.faults.add("/logs/poll", times=None, status=503)
    case.wait("failed")
    assert len(case.asked("/runs/stop")) == 1
    assert over(run).raw_status == "terminated"
    assert any(
        "DstackServerUnreachable" in str(record) for record in case.components.log(case.dag_id, case.run_id)
    )


def test_an_exception_with_a_try_left_leaves_the_run_to_the_next_try(case: Case) -> None:
    case.start("lost_sight", case.gated)
    run = case.running()
    case.wait_for_step()
    case.server.faults.add("/logs/poll", times=None, status=503)
    case.wait("up_for_retry")
    case.server.faults.clear()
    case.wait_for_step(attempt=2)
    case.gate.touch()
    case.assert_one_run_went_on(run)
    assert case.steps(attempt=2) == _STEPS


def test_a_retry_after_a_failed_run_submits_another(case: Case) -> None:
    case.start("retried", f"echo step-1; [ -e {case.gate} ] || {{ touch {case.gate}; exit 3; }}")
    case.wait("success")
    newest, oldest = case.runs()
    assert (newest.raw_status, oldest.raw_status) == ("done", "failed")
    assert newest.name != oldest.name
    assert case.asked("/runs/stop") == []
    assert any(
        "exited with status 3" in str(record) for record in case.components.log(case.dag_id, case.run_id)
    )


def test_an_execution_timeout_with_a_try_left_stops_the_run(case: Case) -> None:
    case.start("timed_out", case.gated)
    run = case.running()
    case.wait("up_for_retry")
    assert len(case.asked("/runs/stop")) == 1
    assert over(run).raw_status == "terminated"
    assert len(case.runs()) == 1
    assert case.steps() == _STEPS[:3]
