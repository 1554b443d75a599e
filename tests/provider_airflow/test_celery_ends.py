"""Users end and clear some of several dozen tasks: their runs are stopped, cleared tasks get one new run each."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.provider_airflow.fleet import LONG_FLEET_TEST, Fleet
from tests.provider_airflow.fleet_runs import LINES, MappedRun, gate
from tests.provider_airflow.support import wait_for

pytestmark = LONG_FLEET_TEST


def test_ends_and_clears_under_load(
    fleet: Fleet, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with gate(tmp_path / "gate") as closed:
        sync = MappedRun(fleet, "sync_retried_8", closed.command)
        sync.wait_for_runs("running")
        deferred = MappedRun(fleet, "deferred_retried_40", closed.command)
        deferred.wait_for_states("deferred")
        deferred.wait_until_shown()
        # What happens to which tasks; the last ones are left alone.
        plans = {
            run: {what: list(range(first, first + each)) for first, what in enumerate_by(each)}
            for run, each in ((sync, 2), (deferred, 10))
        }
        stops: dict[str, float] = {}
        for run, plan in plans.items():
            before, since = stop_times(run), time.monotonic()
            for state in ("failed", "success"):
                for number in plan[state]:
                    run.mark(number, state)
            run.clear(plan["cleared"])
            expected_stops = len(before) + sum(map(len, plan.values()))
            wait_for(f"stop requests of {run.dag_id}", partial(has_stops, run, expected_stops), 120, 0.5)
            stops[run.dag_id] = stop_times(run)[-1] - since
        for run, plan in plans.items():
            wait_for(f"new runs of {run.dag_id}", partial(have_new_runs, run, plan["cleared"]), 240, 1.0)
    for run, plan in plans.items():
        run.wait_for_states("success", "failed", seconds=600)
        runs, tasks = run.runs(), run.tasks()
        for number in range(run.number):
            what = next((what for what, numbers in plan.items() if number in numbers), "left alone")
            statuses = [one.raw_status for one in runs[number]]
            expected = {
                "failed": ("failed", ["terminated"]),
                "success": ("success", ["terminated"]),
                "cleared": ("success", ["done", "terminated"]),
                "left alone": ("success", ["done"]),
            }[what]
            assert (tasks[number]["state"], statuses) == expected, (run.dag_id, number, what)
            if statuses[0] == "done":
                assert run.lines(number, int(tasks[number]["try_number"])) == LINES
    shown = ", ".join(f"{value:.1f} ({name})" for name, value in stops.items())
    record_property("seconds until the last stop", shown)


def enumerate_by(each: int) -> list[tuple[int, str]]:
    """Return the first number of each kind of end."""
    return [(index * each, what) for index, what in enumerate(("failed", "success", "cleared"))]


def stop_times(run: MappedRun) -> list[float]:
    """Return when the stop requests for the runs of a DAG run came (``time.monotonic()``)."""
    return [one.time for one in run.fleet.dstack.requests if one.path.endswith("/runs/stop")]


def has_stops(run: MappedRun, number: int) -> bool:
    return len(stop_times(run)) >= number


def have_new_runs(run: MappedRun, numbers: list[int]) -> bool:
    """Return whether each of these tasks has a second run, which is the only active one."""
    runs = run.runs()
    return all([one.raw_status for one in runs[number]] == ["running", "terminated"] for number in numbers)
