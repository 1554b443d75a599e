"""A slow dstack server and one that is away, on a fleet."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from tests.provider_airflow.fleet import LONG_FLEET_TEST, Fleet
from tests.provider_airflow.fleet_runs import MappedRun, gate
from tests.provider_airflow.support import wait_for

pytestmark = LONG_FLEET_TEST

_AWAY_SECONDS = 180.0


def test_execution_timeout_stops_the_runs_of_a_slow_server(fleet: Fleet) -> None:
    fleet.dstack.faults.slow(2.5)
    try:
        runs = [MappedRun(fleet, f"timed_out_{mode}_4", "sleep 3600") for mode in ("sync", "deferred")]
        for run in runs:
            run.wait_for_states("failed", seconds=600)
            # The stop of a task takes at most as long as the connection's timeout, 30 s.
            wait_for(f"end of the runs of {run.dag_id}", partial(are_over, run), 60, 1.0)
    finally:
        fleet.dstack.faults.slow(0)
    for run in runs:
        run.assert_one_run_each("terminated")


def are_over(run: MappedRun) -> bool:
    return all(one.outcome() is not None for runs in run.runs().values() for one in runs)


def test_runs_are_taken_up_again_after_three_minutes_without_the_server(fleet: Fleet, tmp_path: Path) -> None:
    with gate(tmp_path / "gate") as closed:
        sync = MappedRun(fleet, "sync_6", closed.command)
        deferred = MappedRun(fleet, "deferred_20", closed.command)
        sync.wait_for_runs("running")
        deferred.wait_for_states("deferred")
        deferred.wait_until_shown()
        fleet.dstack.faults.add("", times=None, drop="before")
        try:
            time.sleep(_AWAY_SECONDS / 2)
            # The runs end while no task can poll them.
            closed.open()
            time.sleep(_AWAY_SECONDS / 2)
        finally:
            fleet.dstack.faults.clear()
    for run in (sync, deferred):
        run.wait_for_states("success", seconds=600)
        run.assert_one_run_each()
        run.assert_logs()
        assert {task["try_number"] for task in run.tasks()} == {1}
    assert (sync.requests("/runs/apply"), sync.requests("/runs/stop")) == (26, 0)
