"""Runs stopped on a slow or forgetful server, by real Prefect processes: a fast part of the whole matrix."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.faults.latency_judge import LatencyResult
from tests.faults.prefect_latency import ways
from tests.faults.prefect_latency_host import served_to, try_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CASES = [
    ("cancel, main thread", "each reply 2.5 s"),
    ("cancel, mapped", "drops it three times"),
    ("timeout of a task", "each reply 4 s"),
    ("timeout of an async task", "drops every stop"),
    ("Ctrl-C, submitted", "slow as a whole, 1 to 5 s"),
    ("crash hook", "drops the stop once"),
]


@pytest.fixture(scope="module")
def results(prefect_server: str) -> Iterator[dict[tuple[str, str], LatencyResult]]:
    """Try all cases at once, since they mostly wait."""
    only = "|".join(f"^{re.escape(f'{way}, {fault}')}$" for way, fault in CASES)
    with served_to(prefect_server) as host:
        yield {(one.way, one.fault): one for one in try_all(host, ways(host), only=only, workers=len(CASES))}


@pytest.mark.parametrize(("way", "fault"), CASES, ids=[", ".join(case) for case in CASES])
def test_nothing_is_left_running_and_prefect_shows_its_end(
    way: str, fault: str, results: dict[tuple[str, str], LatencyResult]
) -> None:
    assert results[way, fault].flaw == "", results[way, fault]
