"""A triggerer of two is lost, or hangs for longer than its heartbeat: the other one takes over."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.provider_airflow.fleet import LONG_FLEET_TEST, Fleet
from tests.provider_airflow.fleet_runs import MappedRun
from tests.provider_airflow.support import wait_for

pytestmark = LONG_FLEET_TEST

_TICKS = 60
_SECONDS = 2
_LINES = [f"tick-{number}" for number in range(1, _TICKS + 1)]
_COMMAND = f"for i in $(seq 1 {_TICKS}); do echo tick-$i; sleep {_SECONDS}; done"
# A position is saved about a second after a line; a busy machine is later.
_MOST_REPEATED = 30 // _SECONDS


@pytest.fixture
def watched(fleet: Fleet) -> MappedRun:
    """Return a DAG run of 50 deferred tasks whose runs write a line every other second."""
    run = MappedRun(fleet, "deferred_50", _COMMAND)
    run.wait_for_states("deferred")
    run.wait_until_shown(_LINES[0])
    return run


def watched_by(run: MappedRun, name: str) -> int:
    """Return how many tasks a triggerer has."""
    names = run.fleet.triggerers()
    jobs = [task["triggerer_job"] or {} for task in run.tasks()]
    return sum(names.get(job.get("id", -1)) == name for job in jobs)


def finish(run: MappedRun, record_property: Callable[[str, object], None]) -> None:
    """Wait for the end, and compare what Airflow shows with what the runs did."""
    run.wait_for_states("success", seconds=600)
    run.assert_one_run_each()
    assert run.requests("/runs/stop") == 0
    repeated = run.repeated_lines(_LINES)
    record_property(
        "repeated_lines", f"{sum(repeated)} of {run.number * _TICKS}, {max(repeated)} at most in a log"
    )
    assert max(repeated) <= _MOST_REPEATED


def test_a_lost_triggerer_is_replaced_by_the_other_one(
    watched: MappedRun, record_property: Callable[[str, object], None]
) -> None:
    fleet = watched.fleet
    assert watched_by(watched, "triggerer") > 0
    fleet.lose("triggerer")
    try:
        wait_for(
            "take-over", lambda: watched_by(watched, "triggerer-2") == watched.states()["deferred"], 300, 1.0
        )
        finish(watched, record_property)
    finally:
        fleet.restart("triggerer")


def test_a_triggerer_that_hangs_and_comes_back_stops_nothing(
    watched: MappedRun, record_property: Callable[[str, object], None]
) -> None:
    fleet = watched.fleet
    assert watched_by(watched, "triggerer") > 0
    fleet.lose("triggerer", signal.SIGSTOP)
    try:
        wait_for(
            "take-over", lambda: watched_by(watched, "triggerer-2") == watched.states()["deferred"], 300, 1.0
        )
    finally:
        fleet.lose("triggerer", signal.SIGCONT)
    try:
        finish(watched, record_property)
    finally:
        fleet.restart("triggerer")
