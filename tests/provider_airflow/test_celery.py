"""The provider on a fleet: CeleryExecutor with two workers, two schedulers and two triggerers.

The short form; the other files of this name have more tasks, more losses, and outages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.provider_airflow.fleet import Fleet
from tests.provider_airflow.fleet_runs import MappedRun, gate
from tests.provider_airflow.fleet_tasks import STEPS, Working

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(1200)]


def test_mapped_tasks_on_two_workers_and_two_triggerers(fleet: Fleet, tmp_path: Path) -> None:
    with gate(tmp_path / "gate") as closed:
        sync = MappedRun(fleet, "sync_6", closed.command)
        deferred = MappedRun(fleet, "deferred_8", closed.command)
        sync.wait_for_runs("running")
        deferred.wait_for_states("deferred")
        workers = {fleet.component_on(task["hostname"]) for task in sync.tasks()}
        assert workers == {"worker", "worker-2"}
        # Which of the two takes a trigger is a race between them.
        assert set(deferred.wait_for_triggerers()) <= {"triggerer", "triggerer-2"}
    for run in (sync, deferred):
        run.wait_for_states("success")
        run.assert_one_run_each()
        run.assert_logs()
    assert (sync.requests("/runs/apply"), sync.requests("/runs/stop")) == (14, 0)


def test_a_lost_worker_leaves_the_run_to_the_next_try(working: Callable[[str], Working]) -> None:
    case = working("retried")
    case.fleet.lose(case.worker)
    case.wait_for_next_try()
    case.assert_alive_once()
    case.gate.touch()
    case.assert_one_run_went_on(case.run)
    assert case.steps(attempt=2) == STEPS
    task = case.components.task(case.dag_id, case.run_id)
    assert case.fleet.component_on(task["hostname"]) != case.worker
