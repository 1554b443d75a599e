"""A task's process or the triggerer's is killed during a request: a fast part of the matrix of tests/faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from tests.faults.airflow_kills import ADAPTERS, hosted_by
from tests.faults.faults import KILLS
from tests.faults.life import KILLED, Result
from tests.faults.matrix import plan, try_all
from tests.provider_airflow.components import Components

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.long, pytest.mark.timeout(900)]

# During the submission, and while the run is followed; the last request of a deferred task is the triggerer's.
_STEPS = (3, 5, 9, 15)


@dataclass(frozen=True)
class _Tried:
    results: Mapping[tuple[str, str, int], Result]
    restarts: int


@pytest.fixture(scope="module")
def tried(components: Components) -> _Tried:
    """Try all cases at once, since they mostly wait."""
    with hosted_by(components) as keeper:
        results = try_all(plan(ADAPTERS, [KILLED], _STEPS))
        return _Tried({(one.adapter, one.fault, one.step): one for one in results}, keeper.restarts)


@pytest.mark.parametrize("step", _STEPS)
@pytest.mark.parametrize("kill", [kill.name for kill in KILLS])
@pytest.mark.parametrize("way", ADAPTERS)
def test_a_process_killed_during_a_request_costs_no_line_and_no_second_run(
    tried: _Tried, way: str, kill: str, step: int
) -> None:
    result = tried.results[way, kill, step]
    assert (result.reached, result.flaw) == (True, "")


def test_the_triggerer_was_among_the_killed(tried: _Tried) -> None:
    assert tried.restarts >= len(KILLS)
