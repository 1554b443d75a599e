"""Progress bars, times and groups in the log of a task, through a deferral and a take-over."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dstack._log_groups import LogGroups
from airflow_provider_dstack._log_relay import new_relay, records
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import (
    ContactLost,
    Event,
    Progress,
    Reported,
    RunFinished,
    RunStatus,
    StatusChanged,
    Waiting,
)
from dstack_core._flow import partial_lines
from dstack_core.local import LocalServer
from tests.provider_airflow.test_operator import CONTEXT, operator
from tests.provider_airflow.test_relay import LINES, OUTCOME
from tests.provider_airflow.test_remaining_log import worker_log  # noqa: F401
from tests.provider_airflow.test_trigger_relay import Log, log, xcoms  # noqa: F401
from tests.provider_airflow.triggering import payloads, submitted, trigger_for, until

WAITING = Progress("af-1", "id-1", "submitted")


def status(word: str) -> StatusChanged:
    return StatusChanged(replace(WAITING, status=word), RunStatus(word), None, None)


def texts(groups: LogGroups, *events: Event) -> list[str]:
    relay = new_relay()
    return [text for event in events for _, text in records(relay, event, None, groups)]


def waiting(now: Any, word: str = "submitted") -> Waiting:
    return Waiting(replace(WAITING, status=word), "capacity", now)


@pytest.fixture
def now() -> Any:
    return datetime.now(UTC)


def test_what_comes_before_the_start_is_folded_and_what_the_commands_write_is_not(now: Any) -> None:
    events = (
        status("submitted"),
        waiting(now),
        Reported(WAITING, "metric", {"loss": 1}),
        status("provisioning"),
        ContactLost(WAITING, "no answer", 1.0, 599.0),
        status("downloading"),
        status("running"),
        LINES,
        RunFinished(WAITING, OUTCOME),
    )
    shown = texts(LogGroups(True), *events)
    assert [re.sub(r" \(.*| finished.*|: (?!:).*|\. .*", "", text) for text in shown] == [
        "::group::Provisioning of run af-1",
        "Run af-1",
        "Run af-1 waits for capacity",
        "Run af-1",
        "::endgroup::",
        "no answer",
        "::group::Setup of run af-1",
        "Run af-1",
        "::endgroup::",
        "Run af-1",
        "one",
        "two",
        "Run af-1",
    ]
    assert not [text for text in texts(LogGroups(), *events) if "group::" in text]


def test_a_part_of_a_log_closes_its_group(now: Any) -> None:
    groups = LogGroups(True)
    texts(groups, waiting(now))
    assert [text for _, text in groups.close()] == ["::endgroup::"]
    assert list(groups.close()) == []
    # The next part opens its own.
    assert texts(LogGroups(True), waiting(now))[0] == "::group::Provisioning of run af-1"


def test_a_group_of_the_run_is_a_record_of_its_own_and_closed_before_the_outcome() -> None:
    lines = [f"line {number}" for number in range(40)]
    lines[10:10] = ["::group::epoch 1", "loss 3", "::endgroup::", "::endgroup::", "::group::epoch 2"]
    groups = LogGroups()
    shown = texts(groups, replace(LINES, lines=tuple(lines)))
    assert shown[1:6] == ["::group::epoch 1", "loss 3", "::endgroup::", "::endgroup::", "::group::epoch 2"]
    assert "\n".join(shown) == "\n".join(lines)
    assert texts(groups, RunFinished(WAITING, OUTCOME))[0] == "::endgroup::"
    assert texts(groups, RunFinished(WAITING, OUTCOME))[0] != "::endgroup::"


BAR = (
    r"i=0; while [ ! -e {gate} ]; do i=$((i+1)); printf '\r %s%%|##|' $i; sleep 0.1; done; "
    r"printf '\r100%%|done\n'; echo end"
)


def test_a_progress_bar_is_shown_by_each_trigger_and_its_line_comes_once(
    server: LocalServer,
    xcoms: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    log: Log,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partial_lines, "_OPEN_SECONDS", 0.1)
    monkeypatch.setattr(partial_lines, "_SECONDS_BETWEEN", 0.3)
    gate = tmp_path / "gate"
    run = submitted(server, BAR.replace("{gate}", str(gate)))
    first = log.of(trigger_for(run, log_timestamps=True))

    def bars() -> list[str]:
        return [line for line in log.lines if line.endswith("|##| (still running)")]

    asyncio.run(until(first, lambda: len(bars()) >= 2))
    shown = len(bars())
    second = log.of(DstackRunTrigger(**first.serialize()[1]))
    second.task_instance = first.task_instance
    asyncio.run(until(second, lambda: len(bars()) > shown))
    gate.touch()
    third = log.of(DstackRunTrigger(**first.serialize()[1]))
    third.task_instance = first.task_instance
    (payload,) = asyncio.run(payloads(third))
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    assert len([line for line in log.lines if re.fullmatch(time + r"100%\|done", line)]) == 1
    assert all(re.match(time, line) for line in bars())
    # The lines of an error have no times, and no state of a line.
    assert payload["tail"] == ["100%|done", "end"]


def test_the_worker_that_relays_the_rest_shows_times_too(
    server: LocalServer,
    xcoms: dict[str, Any],  # noqa: F811
    log: Log,  # noqa: F811
    worker_log: Log,  # noqa: F811
) -> None:
    run = submitted(server, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo row-$i-$(printf %090d 0); done")
    run.wait(poll_interval=0.2)
    (payload,) = asyncio.run(payloads(log.of(trigger_for(run, log_timestamps=True, log_budget_bytes=None))))
    assert payload["rest"]
    task = operator(log_timestamps=True, log_budget_bytes=None)
    task.execute_complete(CONTEXT, payload)
    rows = [line for line in log.lines + worker_log.lines if " row-" in line]
    assert [int(line.split("row-")[1].split("-")[0]) for line in rows] == list(range(1, 20001))
    assert all(re.match(r"\d{4}-\d\d-\d\dT\S{12}Z row-", line) for line in rows)
