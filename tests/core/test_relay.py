"""Events become the records that a workflow engine logs. Both adapters use this code."""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dstack_core import (
    ContactLost,
    ContactRestored,
    LogLines,
    Outcome,
    Progress,
    RunFinished,
    RunStatus,
    StatusChanged,
)
from dstack_core.integration import LogRelay, RecordLimits

PROGRESS = Progress("train", "id-1", "running")
LINES = LogLines(PROGRESS, ("one", "two"), 0, 0, 0, "s-1")
AIRFLOW = RecordLimits(few_lines=32)
PREFECT = RecordLimits(max_lines=200)
HOSTS = pytest.mark.parametrize(
    "limits", [AIRFLOW, PREFECT, RecordLimits()], ids=["airflow", "prefect", "plain"]
)
URL = "http://dstack/run"


def of(*lines: str, **fields: Any) -> LogLines:
    return replace(LINES, lines=lines, **fields)


def texts(relay: LogRelay, *lines: str, **fields: Any) -> list[str]:
    return [text for _, text in relay.records(of(*lines, **fields))]


def shown(relay: LogRelay, *lines: str) -> list[str]:
    """Return the lines of all records as a reader sees them."""
    return [line for text in texts(relay, *lines) for line in text.split("\n")]


# Records.


def test_few_lines_are_one_record_each_where_the_limits_allow() -> None:
    assert list(LogRelay(limits=AIRFLOW).records(LINES)) == [(logging.INFO, "one"), (logging.INFO, "two")]
    assert list(LogRelay(limits=PREFECT).records(LINES)) == [(logging.INFO, "one\ntwo")]
    assert list(LogRelay().records(of())) == []


@HOSTS
def test_many_lines_make_few_records_and_none_is_lost(limits: RecordLimits) -> None:
    lines = [f"{number:05} " + "ä" * 300 for number in range(100)]
    records = texts(LogRelay(limits=limits), *lines)
    assert len(records) == 4
    assert [line for text in records for line in text.split("\n")] == lines


def test_a_record_has_at_most_so_many_lines() -> None:
    lines = [f"line {number}" for number in range(1000)]
    records = texts(LogRelay(limits=PREFECT), *lines)
    assert [record.count("\n") + 1 for record in records] == [200] * 5
    assert "\n".join(records).split("\n") == lines


@HOSTS
def test_a_line_too_long_for_a_record_is_split_and_keeps_every_character(limits: RecordLimits) -> None:
    line = "x" + "é" * 40_000
    records = texts(LogRelay(limits=limits), "before", line, "after")
    assert all(len(text.encode()) <= 16 * 1024 for text in records)
    assert "".join(records).replace("\n", "") == f"before{line}after"
    assert records[0] == "before"


@HOSTS
def test_all_lines_arrive_whole_and_in_order(limits: RecordLimits) -> None:
    chance = random.Random(7)
    limits = replace(limits, max_bytes=40)
    for _ in range(300):
        lines = [
            "".join(chance.choices("aß漢🚀 ", k=chance.choice([0, 0, 1, 5, 9, 39, 60])))
            for _ in range(chance.randint(1, 60))
        ]
        records = texts(LogRelay(limits=limits), *lines)
        assert all(len(record.encode()) <= 40 for record in records)
        assert "".join(records).replace("\n", "") == "".join(lines)
        short = [line for line in lines if len(line.encode()) <= 40]
        found = iter(line for record in records for line in record.split("\n"))
        # Every line that fits is one line of the records, in order.
        assert all(line in found for line in short)


def test_limits_that_no_record_can_meet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_bytes: expected 4 or more, got 3\."):
        RecordLimits(max_bytes=3)
    with pytest.raises(ValueError, match=r"max_lines: expected 1 or more, or None, got 0\."):
        RecordLimits(max_lines=0)


# The form of a line.


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ("\x1b[1;32mgreen\x1b[0m", "green"),
        ("\x1b[1;32mgreen\x1b(B\x1b[m", "green"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("cut short \x1b[3", "cut short "),
        ("\x1b]0;no end", "\ufffd]0;no end"),
        ("nul\x00byte", "nul\ufffdbyte"),
        ("bell\x07 back\x08 del\x7f form\x0c", "bell\ufffd back\ufffd del\ufffd form\ufffd"),
        ("next\x85line csi\x9b", "next\ufffdline csi\ufffd"),
        ("\ud800 lone", "\ufffd lone"),
        (" 10%\r 50%\r100%", "100%"),
        (" 10%\r\x1b[K100%\r", "100%"),
        ("tab\tstays", "tab\tstays"),
        ("unicode ✓ 日本 £ ü", "unicode ✓ 日本 £ ü"),
        ("100% %s %d {}", "100% %s %d {}"),
        ("", ""),
    ],
)
def test_lines_are_cleaned_for_display(raw: str, line: str) -> None:
    relay = LogRelay(limits=AIRFLOW)
    assert texts(relay, raw) == [line]
    # Among other lines, which stay as they are.
    assert texts(relay, "before", raw, "after") == ["before", line, "after"]
    assert relay.tail == [line, "before", line, "after"]


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, ""),
        ({"attempt": 1}, "[attempt 2] "),
        ({"nodes": 2}, "[node 0] "),
        ({"node": 1, "nodes": 2}, "[node 1] "),
        ({"replica": 3, "replicas": 4}, "[replica 3] "),
        (
            {"replica": 0, "replicas": 2, "node": 1, "nodes": 2, "attempt": 2},
            "[replica 0, node 1, attempt 3] ",
        ),
    ],
)
def test_a_prefix_names_the_log_where_a_run_has_several(fields: dict[str, int], prefix: str) -> None:
    relay = LogRelay(limits=AIRFLOW)
    assert texts(relay, "x", "", **fields) == [f"{prefix}x", prefix]
    assert relay.tail == [f"{prefix}x", prefix]


def test_secrets_are_masked_in_records_and_in_the_tail() -> None:
    secrets = ["hunter2.+", "hunter2.+longer", "two lines\nof a key", "abc", "bell\x07bell"]
    relay = LogRelay(limits=AIRFLOW, secrets=secrets, tail=["was hunter2.+ there"])
    lines = ("it is hunter2.+", "or hunter2.+longer!", "two lines", "of a key", "abc", "bell\x07bell")
    assert texts(relay, *lines) == ["it is ***", "or ***!", "***", "***", "abc", "***"]
    assert relay.tail == ["was *** there", "it is ***", "or ***!", "***", "***", "abc", "***"]
    # Colours do not hide a secret, and no record ends in the middle of one.
    assert texts(relay, "hunt\x1b[1mer2.+") == ["***"]
    small = LogRelay(limits=RecordLimits(max_bytes=8), secrets=["hunter2.+"])
    assert texts(small, "1234hunter2.+") == ["1234***"]
    relay.masker.add(["found later"])
    assert texts(relay, "hunter2.+ found later") == ["*** ***"]


# Budget, tail and state.


def test_lines_beyond_the_budget_are_counted_and_linked() -> None:
    relay = LogRelay(limits=AIRFLOW, log_budget_bytes=1000, url=URL)
    assert texts(relay, *["x" * 99] * 9) == ["x" * 99] * 9
    assert list(relay.records(of("fits" * 10, "y" * 99, "short"))) == [
        (logging.INFO, "fits" * 10),
        (
            logging.WARNING,
            f"The log is longer than its budget of 1.0 kB; the rest is not shown here. See {URL}",
        ),
    ]
    assert texts(relay, "z" * 999_999) == []
    assert relay.tail[-4:] == ["fits" * 10, "y" * 99, "short", "z" * 500]
    assert relay.state() == {"tail": relay.tail, "relayed_bytes": 941, "left_out_bytes": 1_000_106}
    assert list(relay.records(RunFinished(PROGRESS, outcome()))) == [
        (logging.WARNING, f"1.0 MB of the log is not shown here. See {URL}")
    ]


@pytest.mark.parametrize(("budget", "lines"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_the_budget_covers_whole_lines(budget: int, lines: int) -> None:
    relay = LogRelay(limits=AIRFLOW, log_budget_bytes=budget)
    levels = [level for level, _ in relay.records(of("one", "two", "x" * 9))]
    assert levels == [logging.INFO] * lines + [logging.WARNING]
    assert relay.state()["relayed_bytes"] == 4 * lines
    assert relay.state()["left_out_bytes"] == 18 - 4 * lines


def test_another_process_continues_with_the_same_budget() -> None:
    relay = LogRelay(log_budget_bytes=10)
    assert texts(relay, "one", "two") == ["one\ntwo"]
    later = LogRelay(**relay.state(), log_budget_bytes=10)
    assert [level for level, _ in later.records(LINES)] == [logging.WARNING]
    last = LogRelay(**later.state(), log_budget_bytes=10)
    assert list(last.records(LINES)) == []
    assert last.state()["left_out_bytes"] == 16


def test_without_a_budget_all_lines_are_shown() -> None:
    relay = LogRelay(log_budget_bytes=None)
    assert sum(text.count("x") for text in texts(relay, *["x" * 999] * 20_000)) == 999 * 20_000
    assert relay.state()["left_out_bytes"] == 0
    assert list(relay.records(RunFinished(PROGRESS, outcome()))) == []


def test_the_tail_is_short_and_continues_that_of_another_process() -> None:
    relay = LogRelay(tail=["before"])
    list(relay.records(LINES))
    assert relay.tail == ["before", "one", "two"]
    texts(relay, *["y" * 9999] * 50)
    assert relay.tail == ["y" * 500] * 20


def test_the_state_covers_only_events_whose_records_were_all_consumed() -> None:
    relay = LogRelay(limits=AIRFLOW)
    list(relay.records(LINES))
    before = relay.state()
    records = relay.records(of("three", "four"))
    assert next(records) == (logging.INFO, "three")
    assert relay.state() == before
    assert [text for _, text in records] == ["four"]
    assert relay.state() == {
        "tail": ["one", "two", "three", "four"],
        "relayed_bytes": 19,
        "left_out_bytes": 0,
    }


def test_without_logging_the_last_lines_are_still_kept() -> None:
    relay = LogRelay(shows_log=False, log_budget_bytes=10)
    assert texts(relay, *map(str, range(50))) == []
    assert relay.tail == [str(number) for number in range(30, 50)]
    assert list(relay.records(RunFinished(PROGRESS, outcome()))) == []


def test_what_was_logged_before_is_not_logged_again() -> None:
    long = "x" * 20_000
    before = Counter(["same", "same", "once", "x" * 16_384, "x" * 3_616])
    relay = LogRelay(already_logged=before)
    assert shown(relay, "same", "once", "same") == []
    assert shown(relay, "same", long, "new") == ["same", "new"]
    assert before["same"] == 2
    assert relay.tail == ["same", "once", "same", "same", "x" * 500, "new"]


# Other events.


def test_statuses_except_the_last_are_logged_with_the_servers_message() -> None:
    relay = LogRelay()
    assert list(relay.records(StatusChanged(PROGRESS, RunStatus.RUNNING, None, "pulling"))) == [
        (logging.INFO, "Run train: running (pulling)")
    ]
    assert list(relay.records(StatusChanged(PROGRESS, RunStatus("pending"), None, None))) == [
        (logging.INFO, "Run train: pending")
    ]
    assert list(relay.records(StatusChanged(PROGRESS, RunStatus.DONE, None, None))) == []


def test_an_unreachable_server_is_logged_once_a_minute() -> None:
    relay = LogRelay()
    faults = [ContactLost(PROGRESS, "no answer from X.", float(s), 600.0 - s) for s in range(0, 130, 10)]
    logged = [record for fault in faults for record in relay.records(fault)]
    assert logged == [
        (logging.WARNING, f"no answer from X. The run keeps running; retrying for another {left} s.")
        for left in (600, 540, 480)
    ]
    assert list(relay.records(ContactRestored(PROGRESS, 130.0))) == [
        (logging.INFO, "The dstack server answers again after 130 s.")
    ]
    # The next fault is logged at once, even if the end of the last one was not reported.
    assert len(list(relay.records(ContactLost(PROGRESS, "no answer", 0.5, 600.0)))) == 1
    assert len(list(relay.records(ContactLost(PROGRESS, "no answer", 0.0, 600.0)))) == 1


def test_before_the_submission_no_run_is_reported_as_running() -> None:
    fault = ContactLost(Progress("train"), "no answer", 5.0, 595.0)
    assert [text for _, text in LogRelay().records(fault)] == ["no answer. Retrying for another 595 s."]


def test_an_event_of_a_newer_core_is_ignored() -> None:
    assert list(LogRelay().records(cast("Any", SimpleNamespace(progress=PROGRESS)))) == []


def outcome() -> Outcome:
    return Outcome(
        run_name="train",
        run_id="id-1",
        project="main",
        status=RunStatus.DONE,
        exit_status=0,
        reason="all_jobs_done",
        message="finished",
        cost=0.25,
        duration=61.4,
        instance="g5.xlarge",
        backend="aws",
        region="us-east-1",
        price_per_hour=1.2,
        url="http://localhost/r",
    )
