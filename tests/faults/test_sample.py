"""Each fault once, at one request of a run's life or from it on: a fast sample of the whole matrix."""

from __future__ import annotations

import pytest

from tests.faults.core import ADAPTERS
from tests.faults.faults import FAULTS, Fault
from tests.faults.interference import INTERFERENCES, Interference
from tests.faults.life import STEPS, Stage, try_fault, try_interference

# Another request for each fault and adapter, all of them in turn.
SAMPLE = [
    pytest.param(name, fault, STEPS[(3 * number + 7 * other) % len(STEPS)], id=f"{fault.name}-{name}")
    for number, fault in enumerate(FAULTS)
    for other, name in enumerate(ADAPTERS)
]
NEVER_ENDING = [
    pytest.param(name, FAULTS[number], step, id=f"{FAULTS[number].name}-{name}")
    for number, step in ((0, 1), (2, 4), (6, 8), (10, 8), (11, 4))
    for name in ADAPTERS
]

MEDDLED = [
    pytest.param(name, one, one.steps[(5 * number + 3 * other) % len(one.steps)], id=f"{one.name}-{name}")
    for number, one in enumerate(INTERFERENCES)
    for other, name in enumerate(ADAPTERS)
]


@pytest.mark.parametrize(("name", "fault", "step"), SAMPLE)
def test_one_fault_costs_no_line_and_makes_no_second_run(
    stage: Stage, name: str, fault: Fault, step: int
) -> None:
    result = try_fault(stage, name, ADAPTERS[name], fault, step)
    assert (result.reached, result.flaw) == (True, "")


@pytest.mark.parametrize(("name", "fault", "step"), NEVER_ENDING)
def test_a_fault_that_never_ends_raises_one_clear_error(
    stage: Stage, name: str, fault: Fault, step: int
) -> None:
    result = try_fault(stage, name, ADAPTERS[name], fault, step, forever=True)
    assert (result.reached, result.flaw) == (True, "")


@pytest.mark.parametrize(("name", "interference", "step"), MEDDLED)
def test_interference_is_reported_or_does_not_matter(
    stage: Stage, name: str, interference: Interference, step: int
) -> None:
    result = try_interference(stage, name, ADAPTERS[name], interference, step)
    assert (result.reached, result.flaw) == (True, "")


@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_goes_wrong_without_a_fault(stage: Stage, name: str) -> None:
    assert try_fault(stage, name, ADAPTERS[name], None, 0).flaw == ""
