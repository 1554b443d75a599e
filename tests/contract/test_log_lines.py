"""What a run waits for, the time of each line, and a progress bar: the same on both servers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

import dstack_core as dstack
from dstack_core._flow import partial_lines
from tests.contract.conftest import Target

_BAR = r"for i in $(seq 20); do printf '\r %s%%' $i; sleep 0.3; done; printf '\r100%%\n'; echo end"


def test_a_run_reports_what_it_waits_for_times_and_the_state_of_its_progress_bar(
    target: Target, client: dstack.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_lines, "_OPEN_SECONDS", 0.1)
    monkeypatch.setattr(partial_lines, "_SECONDS_BETWEEN", 0.5)
    started = datetime.now(UTC)
    run = client.runs.submit(target.task(_BAR))
    events = list(run.follow(poll_interval=target.poll_interval, waiting_interval=0.001, timestamps=True))
    reports = [event for event in events if isinstance(event, dstack.Waiting)]
    assert reports
    assert {event.text.split()[0].rstrip(":") for event in reports} <= {"capacity", "machine", "a", "image"}
    # The servers run on this machine; their clock is this one's.
    assert all(abs(event.since - started) < timedelta(minutes=2) for event in reports)
    lines = [
        pair
        for event in events
        if isinstance(event, dstack.LogLines)
        for pair in zip(event.times, event.lines, strict=True)
    ]
    assert [line for _, line in lines] == ["100%", "end"]
    assert all(abs(datetime.fromisoformat(time) - started) < timedelta(minutes=2) for time, _ in lines)
    bars = [event.line for event in events if isinstance(event, dstack.PartialLine)]
    assert bars
    assert all(line.strip().removesuffix("%").isdigit() for line in bars)
