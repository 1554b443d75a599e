"""A flow run's process killed at some requests, then executed again: a fast part of the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.faults import matrix, prefect_kills
from tests.faults.faults import KILLS, Fault
from tests.faults.life import Result, try_fault
from tests.faults.prefect_kills import ADAPTERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Before the run exists, during its submission, at its first lines, at its last ones, and at its end.
CASES = [
    (name, KILLS[(number + other) % len(KILLS)], step)
    for number, step in enumerate((2, 3, 5, 9, 15))
    for other, name in enumerate(ADAPTERS)
]
# Prefect's server on SQLite serves them all, beside other suites.
_AT_ONCE = 3


@pytest.fixture(scope="module")
def results(prefect_server: str) -> Iterator[list[Future[Result]]]:
    """Start all cases at once, since they mostly wait."""
    with (
        prefect_kills.served_to(prefect_server),
        matrix.stage() as stage,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        yield [pool.submit(try_fault, stage, name, ADAPTERS[name], kill, step) for name, kill, step in CASES]


@pytest.mark.parametrize(
    ("number", "name", "kill", "step"),
    [
        pytest.param(number, *case, id=f"{case[1].name}-{case[0]}-{case[2]}")
        for number, case in enumerate(CASES)
    ],
)
def test_the_next_execution_logs_every_line_of_the_one_run(
    number: int, name: str, kill: Fault, step: int, results: list[Future[Result]]
) -> None:
    result = results[number].result()
    assert (result.reached, result.flaw) == (True, "")
