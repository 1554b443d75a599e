"""What was told twice is forgiven for one reason alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.faults.airflow_told import Told, told

START = datetime(2026, 1, 1, tzinfo=UTC)
LINES = [f"line-{number:03}" for number in range(1, 7)]


def record(second: float, event: str) -> dict[str, str]:
    return {"timestamp": (START + timedelta(seconds=second)).isoformat(), "event": event}


def log(second_begins_with: int) -> list[dict[str, str]]:
    return [
        record(0, "\n".join(LINES[:2])),
        record(1, "trigger a/b (ID 1) starting"),
        record(2, "\n".join(LINES[2:4])),
        record(5, "trigger a/b (ID 1) starting"),
        record(6, "\n".join(LINES[second_begins_with:])),
    ]


def test_lines_told_once_are_all_there() -> None:
    assert told(log(4), [START + timedelta(seconds=2.5)]) == Told(LINES, 0)


def test_what_was_written_in_the_last_moment_of_a_process_may_come_again() -> None:
    assert told(log(2), [START + timedelta(seconds=2.5)]) == Told(LINES, 2)


@pytest.mark.parametrize("death", [1.9, 4.5, 6.5])
def test_what_was_written_long_before_a_death_or_without_one_may_not(death: float) -> None:
    found = told(log(2), [START + timedelta(seconds=death)])
    assert found == Told(LINES[:4] + LINES[2:], 0)


def test_what_comes_again_with_a_hole_is_not_forgiven() -> None:
    records = [*log(2)[:4], record(6, "\n".join([LINES[2], *LINES[4:]]))]
    found = told(records, [START + timedelta(seconds=2.5)])
    assert found.again == 0
    assert list(found.lines) != LINES


def test_a_line_that_is_left_out_stays_so() -> None:
    assert told(log(5), [START + timedelta(seconds=2.5)]).lines == LINES[:4] + LINES[5:]
