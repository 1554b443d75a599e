"""The shutdown of a Celery worker, with and without tries left, and its loss on the last try."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.provider_airflow.fleet_tasks import STEPS, Working
from tests.provider_airflow.support import json_in, over, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.long,
    pytest.mark.fleet,
    pytest.mark.timeout(900),
]


def test_the_reaper_stops_what_a_lost_worker_leaves_on_the_last_try(
    working: Callable[[str], Working],
) -> None:
    case = working("last_try")
    case.fleet.lose(case.worker)
    case.wait_long("failed")
    case.assert_alive_once()
    shown = case.components.command("dstack", "reap", "--dry-run", "--min-age", "0", "--output", "json")
    assert shown.returncode == 0, shown.stderr
    assert {found["run_name"]: found["action"] for found in json_in(shown.stdout)} == {
        case.run.name: "would stop"
    }
    reaper_run = case.components.trigger("reaper")
    case.components.wait_for_state("reaper", reaper_run, "success")
    assert over(case.run).raw_status == "terminated"
    assert [one.id for one in case.runs()] == [case.run.id]


def test_a_warm_shutdown_of_a_worker_waits_for_its_tasks(working: Callable[[str], Working]) -> None:
    case = working("last_try")
    # The main process alone, as ``airflow celery stop`` and a service manager with KillMode=mixed signal it.
    case.fleet.processes(case.worker)[0].terminate()
    wait_for("shutdown", lambda: "Warm shutdown" in case.fleet.output(case.worker), 30)
    assert case.fleet.is_alive(case.worker)
    case.assert_alive_once()
    case.gate.touch()
    case.assert_one_run_went_on(case.run)
    assert case.steps() == STEPS
    assert case.fleet.ended_within(60, case.worker)


def shut_down_cold(case: Working) -> None:
    """Send SIGQUIT to the worker's main process."""
    case.fleet.processes(case.worker)[0].send_signal(signal.SIGQUIT)


def end_all_processes(case: Working) -> None:
    """Send SIGTERM to the worker's processes, those of its tasks included, as a service manager does by default."""
    case.fleet.lose(case.worker, signal.SIGTERM)


@pytest.mark.parametrize("shut_down", [shut_down_cold, end_all_processes])
def test_a_shutdown_of_a_worker_leaves_the_run_to_the_next_try(
    working: Callable[[str], Working], shut_down: Callable[[Working], None]
) -> None:
    case = working("retried")
    shut_down(case)
    case.wait_for_next_try()
    case.assert_alive_once()
    case.gate.touch()
    case.assert_one_run_went_on(case.run)
    assert case.steps(attempt=2) == STEPS
    assert any("is kept for the task's next try" in line for line in case.log())


@pytest.mark.parametrize("shut_down", [shut_down_cold, end_all_processes])
def test_a_shutdown_of_a_worker_on_the_last_try_stops_the_run(
    working: Callable[[str], Working],
    shut_down: Callable[[Working], None],
    record_property: Callable[[str, object], None],
) -> None:
    case = working("last_try")
    since = time.monotonic()
    shut_down(case)
    seconds = case.wait_for_stop(since)
    record_property("seconds_to_stop", round(seconds, 1))
    assert over(case.run).raw_status == "terminated"
    case.wait_long("failed")
    assert len(case.runs()) == 1
