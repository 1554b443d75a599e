"""Each fault once, at one request of a run's life or from it on: the fast twin of the whole matrix."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from tests.faults.core import ADAPTERS
from tests.faults.faults import FAULTS, Fault
from tests.faults.life import STEPS, try_case
from tests.faults.loop import Loop

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

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.mark.parametrize(("name", "fault", "step"), SAMPLE)
def test_one_fault_costs_no_line_and_makes_no_second_run(
    server: LocalServer, loop: Loop, tmp_path: Path, name: str, fault: Fault, step: int
) -> None:
    result = try_case(name, ADAPTERS[name], loop, server, tmp_path, fault, step)
    assert (result.reached, result.flaw) == (True, "")


@pytest.mark.parametrize(("name", "fault", "step"), NEVER_ENDING)
def test_a_fault_that_never_ends_is_told_once_and_clearly(
    server: LocalServer, loop: Loop, tmp_path: Path, name: str, fault: Fault, step: int
) -> None:
    result = try_case(name, ADAPTERS[name], loop, server, tmp_path, fault, step, for_ever=True)
    assert (result.reached, result.flaw) == (True, "")


@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_goes_wrong_without_a_fault(
    server: LocalServer, loop: Loop, tmp_path: Path, name: str
) -> None:
    assert try_case(name, ADAPTERS[name], loop, server, tmp_path, None, 0).flaw == ""
