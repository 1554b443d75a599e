"""Lines that are in a log twice are accepted for only one reason."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.faults.airflow_log_lines import TryLines, lines_of_try

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


def test_lines_logged_once_are_all_there() -> None:
    assert lines_of_try(log(4), [START + timedelta(seconds=2.5)]) == TryLines(LINES, 0)


def test_lines_written_just_before_a_death_may_be_logged_again() -> None:
    assert lines_of_try(log(2), [START + timedelta(seconds=2.5)]) == TryLines(LINES, 2)


@pytest.mark.parametrize("death", [1.9, 4.5, 6.5])
def test_lines_written_long_before_a_death_or_without_one_may_not(death: float) -> None:
    found = lines_of_try(log(2), [START + timedelta(seconds=death)])
    assert found == TryLines(LINES[:4] + LINES[2:], 0)


def test_repeated_lines_with_a_gap_are_not_accepted() -> None:
    records = [*log(2)[:4], record(6, "\n".join([LINES[2], *LINES[4:]]))]
    found = lines_of_try(records, [START + timedelta(seconds=2.5)])
    assert found.repeated == 0
    assert list(found.lines) != LINES


def test_a_missing_line_stays_missing() -> None:
    assert lines_of_try(log(5), [START + timedelta(seconds=2.5)]).lines == LINES[:4] + LINES[5:]
