"""What a run waits for, the time of each line, and a progress bar: the same on both servers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._flow import partial_lines
from tests.contract.conftest import Target

# Until the test has seen it; without a gate it ends after five minutes.
_BAR = (
    r"i=0; until [ -e {gate} ] || [ $i -ge 3000 ]; do i=$((i + 1)); printf '\r %s%%' $i; sleep 0.1; done; "
    r"printf '\r100%%\n'; echo end"
)


def test_a_run_reports_what_it_waits_for(target: Target, client: dstack.Client) -> None:
    started = datetime.now(UTC)
    # No server has such a machine, and the run waits for it until it is stopped.
    resources = dstack.Resources(gpu=dstack.GPU(name="B200", count=64))
    retry: Any = {"on_events": ["no-capacity"], "duration": "1h"}
    task = target.task("echo never")
    run = client.runs.submit(task, resources=resources, retry_policy=retry)
    reports: list[dstack.Waiting] = []
    for event in run.follow(
        poll_interval=target.poll_interval, waiting_interval=0.001, timeout=target.timeout
    ):
        if isinstance(event, dstack.Waiting) and len(reports) < 2:
            reports.append(event)
            if len(reports) == 2:
                run.stop()
    first, second = reports
    assert {event.text.split()[0].rstrip(":") for event in reports} == {"capacity"}
    assert "B200" in first.text
    assert first.progress.run_name == run.name
    assert second.since >= first.since
    # The servers run on this machine; their clock is this one's.
    assert all(abs(event.since - started) < timedelta(minutes=2) for event in reports)


def test_lines_have_their_times_and_a_progress_bar_shows_its_state(
    target: Target, client: dstack.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_lines, "_OPEN_SECONDS", 0.1)
    monkeypatch.setattr(partial_lines, "_SECONDS_BETWEEN", 0.3)
    gate = tmp_path / "gate"
    started = datetime.now(UTC)
    run = client.runs.submit(target.task(_BAR.replace("{gate}", str(gate))))
    lines: list[tuple[str, str]] = []
    bars: list[str] = []
    for event in run.follow(poll_interval=target.poll_interval, timestamps=True, timeout=target.timeout):
        if isinstance(event, dstack.PartialLine):
            bars.append(event.line)
            if len(bars) == 2:
                gate.touch()
        elif isinstance(event, dstack.LogLines):
            lines += zip(event.times, event.lines, strict=True)
    assert [line for _, line in lines] == ["100%", "end"]
    ended = datetime.now(UTC)
    slack = timedelta(minutes=1)
    assert all(started - slack < datetime.fromisoformat(time) < ended + slack for time, _ in lines)
    assert len(bars) >= 2
    assert all(line.strip().removesuffix("%").isdigit() for line in bars)
