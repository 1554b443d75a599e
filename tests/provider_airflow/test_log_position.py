"""The position in a log that one process leaves to the next, exact to the line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from airflow_provider_dstack._log_relay import LogPosition, position_in
from dstack_core import LogCursor, LogLines, Progress, RunStatus, StatusChanged

START = Progress("af-1", "id-1")


def event(*lines: str, after: str = "1", submission: str = "job") -> LogLines:
    progress = START.with_cursor(submission, LogCursor(after=after))
    return LogLines(progress, lines, 0, 0, 0, submission)


def relayed(position: LogPosition, source: LogLines, parts: int | None = None) -> list[str]:
    """Relay an event, or so many parts of it, and return the lines."""
    lines: list[str] = []
    for number, (part, _) in enumerate(position.new_parts(source)):
        if number == parts:
            return lines
        lines += part.lines
        position.relayed(part, source)
    position.passed(source)
    return lines


def in_another_process(position: LogPosition) -> LogPosition:
    return LogPosition.from_dict(json.loads(json.dumps(position.to_dict())))


@pytest.mark.parametrize("parts", range(9))
def test_each_line_is_relayed_once_wherever_the_first_process_stops(parts: int) -> None:
    big = event(*(f"{number:05} " + "x" * 500 for number in range(1000)))
    first = LogPosition(START, {})
    lines = relayed(first, big, parts)
    second = in_another_process(first)
    assert second.progress == (START if parts < 8 else big.progress)
    lines += relayed(second, big) if parts < 8 else []
    assert tuple(lines) == big.lines
    assert second.to_dict() == {"progress": big.progress.to_dict(), "ahead": {}}


def test_the_next_process_may_get_other_pages() -> None:
    lines = tuple(f"{number:05} " + "x" * 500 for number in range(1000))
    first = LogPosition(START, {})
    told = relayed(first, event(*lines[:700]), 3)
    second = in_another_process(first)
    told += relayed(second, event(*lines[:100], after="1"))
    assert second.to_dict()["ahead"] == {"job": len(told) - 100}
    told += relayed(second, event(*lines[100:], after="2"))
    assert tuple(told) == lines
    assert second.to_dict()["ahead"] == {}


def test_each_submission_has_a_position_of_its_own() -> None:
    lines = tuple(f"{number:05} " + "x" * 500 for number in range(1000))
    first = LogPosition(START, {})
    told = relayed(first, event(*lines, submission="node-1"), 2)
    second = in_another_process(first)
    # The other node's job is read before it, and has new lines.
    assert relayed(second, event("zero", submission="node-0")) == ["zero"]
    told += relayed(second, event(*lines, submission="node-1"))
    assert tuple(told) == lines


def test_few_lines_are_one_part_and_a_status_only_moves_the_position() -> None:
    position = LogPosition(START, {})
    ((part, characters),) = position.new_parts(event("one", "two"))
    assert (part.lines, characters) == (("one", "two"), 6)
    running = StatusChanged(replace(START, status="running"), RunStatus.RUNNING, None, None)
    position.passed(running)
    assert position.progress == running.progress


def test_no_position_is_inside_a_line() -> None:
    # Read later, when the line has its end, it is one line and not several.
    pieces = tuple("é" * 32_768 for _ in range(100))
    assert [part.lines for part, _ in LogPosition(START, {}).new_parts(event("one", *pieces))] == [
        ("one", *pieces)
    ]


def test_the_pieces_at_the_end_of_an_event_are_not_counted_as_lines() -> None:
    first = LogPosition(START, {})
    unfinished = event("one", *("é" * 32_768 for _ in range(20)), after="1")
    for part, _ in first.new_parts(unfinished):
        first.relayed(part, unfinished)
    # The process stops here, before it has passed the event. The next one reads behind the pieces.
    second = in_another_process(first)
    assert second.progress == unfinished.progress
    assert relayed(second, event("é the end", "two", "three", after="2")) == ["é the end", "two", "three"]


def test_a_state_of_an_older_version_has_no_lines_ahead() -> None:
    state = {"progress": START.to_dict(), "tail": []}
    assert LogPosition.from_dict(state).to_dict() == {"progress": START.to_dict(), "ahead": {}}
    assert position_in(state) == position_in({**state, "ahead": {}})
