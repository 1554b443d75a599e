"""Airflow's real components on a real dstack server: a user ends the task, a worker is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dstack_core import Run
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import over, runs_of, wait_for
from tests.rig.server import RealServer

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.real]

_SECONDS = 120.0


class OneTask:
    """A DAG run whose run writes ``step-1`` to ``step-3``, and one more step at each of two gates."""

    def __init__(self, components: Components, server: RealServer, folder: Path, dag_id: str) -> None:
        self.components = components
        self.server = server
        self.dag_id = dag_id
        self.gates = [folder / "first", folder / "second"]
        waits = [
            f"until [ -e {gate} ]; do sleep 0.2; done; echo step-{number}"
            for number, gate in enumerate(self.gates, 4)
        ]
        command = "; ".join(["for i in 1 2 3; do echo step-$i; done", *waits])
        self.dag_run = components.trigger(dag_id, command=command)

    def runs(self) -> list[Run]:
        return runs_of(self.server, f"airflow:{self.dag_id}/{self.dag_run}/")

    def steps(self, attempt: int = 1) -> list[str]:
        lines = self.components.log_lines(self.dag_id, self.dag_run, attempt)
        return [line for line in lines if line.startswith("step-")]

    def wait_for_step(self, number: int, attempt: int = 1) -> None:
        def told() -> bool:
            task = self.components.task(self.dag_id, self.dag_run)
            return task["try_number"] >= attempt and f"step-{number}" in self.steps(attempt)

        wait_for(f"step {number} in the log of try {attempt}", told, _SECONDS)

    def wait(self, *states: str) -> dict[str, object]:
        return self.components.wait_for_state(self.dag_id, self.dag_run, *states, seconds=_SECONDS)

    def the_run(self) -> Run:
        (run,) = self.runs()
        return run


@pytest.fixture
def start(real_components: Components, real_server: RealServer, tmp_path: Path) -> Callable[[str], OneTask]:
    return lambda dag_id: OneTask(real_components, real_server, tmp_path, dag_id)


def assert_stopped_by_its_task(one: OneTask) -> None:
    run = over(one.the_run())
    outcome = run.outcome()
    assert outcome is not None
    assert (run.raw_status, outcome.reason) == ("terminated", "stopped_by_user")
    assert one.components.task(one.dag_id, one.dag_run)["state"] == "failed"


def test_a_running_task_that_is_marked_failed_stops_its_run_on_a_real_server(
    start: Callable[[str], OneTask],
) -> None:
    one = start("retried")
    one.wait_for_step(3)
    one.components.set_state(one.dag_id, one.dag_run, "failed")
    assert_stopped_by_its_task(one)
    assert one.steps() == ["step-1", "step-2", "step-3"]


def test_a_deferred_task_that_is_marked_failed_stops_its_run_on_a_real_server(
    start: Callable[[str], OneTask],
) -> None:
    one = start("deferred")
    one.wait("deferred")
    one.gates[0].touch()
    # Only a trigger can have relayed this line, so there is one to notify of the end.
    one.wait_for_step(4)
    one.components.set_state(one.dag_id, one.dag_run, "failed")
    assert_stopped_by_its_task(one)
    assert one.steps() == [f"step-{number}" for number in range(1, 5)]


def test_a_retry_takes_over_the_run_of_a_killed_worker_on_a_real_server(
    start: Callable[[str], OneTask],
) -> None:
    one = start("retried")
    one.wait_for_step(3)
    run = one.the_run()
    pid = one.components.task(one.dag_id, one.dag_run)["pid"]
    psutil.Process(pid).kill()
    one.wait_for_step(3, attempt=2)
    for gate in one.gates:
        gate.touch()
    one.wait("success")
    assert one.the_run().id == run.id
    assert over(run).raw_status == "done"
    assert one.components.result(one.dag_id, one.dag_run)["run_id"] == run.id
    assert one.steps() == ["step-1", "step-2", "step-3"]
    assert one.steps(attempt=2) == [f"step-{number}" for number in range(1, 6)]
