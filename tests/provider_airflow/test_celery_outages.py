"""Parts of a fleet are away, for 20 s and for 100 s: no healthy run is stopped, none is submitted twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.provider_airflow.fleet import LONG_FLEET_TEST, Fleet
from tests.provider_airflow.fleet_runs import LINES, MappedRun, gate
from tests.provider_airflow.fleet_tasks import STEPS, Working
from tests.provider_airflow.support import over, wait_for

pytestmark = LONG_FLEET_TEST

# Longer than Airflow needs to notice what it lost, on a busy machine.
_RECOVERS_SECONDS = 400.0


def api_server(fleet: Fleet) -> Callable[[], None]:
    """Kill the API server."""
    fleet.kill_one("api-server")
    return lambda: fleet.start_one("api-server")


def redis(fleet: Fleet) -> Callable[[], None]:
    """Kill the broker."""
    fleet.redis.stop(at_once=True)
    return fleet.redis.start


def postgres(fleet: Fleet) -> Callable[[], None]:
    """Stop the database at once; what ended because of that is started again with it."""
    fleet.postgres.stop(at_once=True)

    def start() -> None:
        fleet.postgres.start()
        fleet.start_ended()

    return start


def one_scheduler(fleet: Fleet) -> Callable[[], None]:
    """Kill one of two schedulers."""
    fleet.kill_one("scheduler")
    return lambda: fleet.start_one("scheduler")


def both_schedulers(fleet: Fleet) -> Callable[[], None]:
    """Kill both schedulers."""
    for name in ("scheduler", "scheduler-2"):
        fleet.kill_one(name)

    def start() -> None:
        for name in ("scheduler", "scheduler-2"):
            fleet.start_one(name)

    return start


@pytest.mark.parametrize("seconds", [20.0, 100.0])
@pytest.mark.parametrize("take_away", [api_server, redis, postgres, one_scheduler, both_schedulers])
def test_an_outage_stops_no_run_and_submits_none_again(
    fleet: Fleet,
    tmp_path: Path,
    take_away: Callable[[Fleet], Callable[[], None]],
    seconds: float,
) -> None:
    with gate(tmp_path / "deferred-gate") as closed:
        deferred = MappedRun(fleet, "deferred_8", closed.command)
        cases = [Working(fleet, fleet.dstack, tmp_path / name) for name in ("many_tries", "last_try")]
        for case in cases:
            case.start_working(case.gate.name)
        deferred.wait_for_states("deferred")
        deferred.wait_until_shown()
        bring_back = take_away(fleet)
        try:
            time.sleep(seconds)
        finally:
            bring_back()
            fleet.start_ended()
        for case in cases:
            case.assert_alive_once()
        with_tries, last = cases
        # Airflow ends the processes of tasks whose heartbeats it did not get, and starts those with tries left again.
        wait_for("settled tasks", lambda: all(is_settled(case) for case in cases), _RECOVERS_SECONDS, 1.0)
    for case in cases:
        case.gate.touch()
        assert over(case.run).raw_status == "done"
    fleet.wait_for_state(with_tries.dag_id, with_tries.run_id, "success", seconds=_RECOVERS_SECONDS)
    assert fleet.result(with_tries.dag_id, with_tries.run_id)["run_id"] == with_tries.run.id
    assert with_tries.steps(with_tries.try_number()) == STEPS
    fleet.wait_for_state(last.dag_id, last.run_id, "success", "failed", seconds=_RECOVERS_SECONDS)
    if last.state == "success":
        assert last.steps(last.try_number()) == STEPS
    for case in cases:
        assert [one.id for one in case.runs()] == [case.run.id]
        assert case.asked("/runs/stop") == []
    deferred.wait_for_states("success", seconds=600)
    deferred.assert_one_run_each()
    assert deferred.requests("/runs/stop") == 0
    # A triggerer that ends with the database may repeat lines.
    deferred.repeated_lines(LINES)


def is_settled(case: Working) -> bool:
    """Return whether a process follows the run, or the task has failed for good."""
    task = case.components.task(case.dag_id, case.run_id)
    if task["state"] != "running":
        return bool(task["state"] == "failed")
    return psutil.pid_exists(task["pid"]) and "step-3" in case.log(task["try_number"])
