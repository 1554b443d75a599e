"""Events become log records."""

from __future__ import annotations

import logging
from dataclasses import replace

from airflow_provider_dstack._relay import Relay
from dstack_core import ContactLost, LogLines, Outcome, Progress, RunFinished, RunStatus, StatusChanged

PROGRESS = Progress("af-1", "id-1", "running")
LINES = LogLines(PROGRESS, ("one", "two"), 0, 0, 0, "s-1")
OUTCOME = Outcome(
    run_name="af-1",
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


def test_a_few_lines_are_a_record_each() -> None:
    assert list(Relay().records(LINES)) == [(logging.INFO, "one"), (logging.INFO, "two")]


def test_many_lines_are_packed_into_records_of_at_most_16_kib() -> None:
    lines = tuple(f"{number:05} " + "ä" * 300 for number in range(100))
    records = [text for _, text in Relay().records(replace(LINES, lines=lines))]
    assert len(records) == 4
    assert all(len(text.encode()) <= 16 * 1024 for text in records)
    assert tuple(line for text in records for line in text.split("\n")) == lines


def test_a_line_too_long_for_a_record_is_cut_into_pieces() -> None:
    line = "é" * 40_000
    records = [text for _, text in Relay().records(replace(LINES, lines=(line,)))]
    assert all(len(text.encode()) <= 16 * 1024 for text in records)
    assert "".join(records).replace("\n", "") == line


def test_odd_text_does_no_harm() -> None:
    odd = ("", "100% %s %d {}", "\ud800 lone", "\x1b[31mred\x1b[0m")
    assert [text for _, text in Relay().records(replace(LINES, lines=odd))] == list(odd)


def test_nul_is_neither_shown_nor_kept_for_a_database_refuses_it() -> None:
    relay = Relay()
    texts = [text for _, text in relay.records(replace(LINES, lines=("nul \x00 byte",)))]
    assert texts == relay.tail == ["nul \ufffd byte"]


def test_lines_of_several_nodes_and_attempts_say_whose_they_are() -> None:
    event = replace(LINES, lines=("x",), node=2, attempt=1)
    assert list(Relay().records(event)) == [(logging.INFO, "[node 2 attempt 1] x")]


def test_the_tail_is_short_and_goes_on_where_another_process_left_off() -> None:
    relay = Relay(["before"])
    list(relay.records(LINES))
    assert relay.tail == ["before", "one", "two"]
    list(relay.records(replace(LINES, lines=tuple("y" * 9999 for _ in range(50)))))
    assert len(relay.tail) == 20
    assert all(len(line) == 500 for line in relay.tail)


def test_what_the_budget_does_not_cover_is_counted_and_linked() -> None:
    relay = Relay(log_budget_bytes=1000, url="http://dstack/run")
    first = [text for _, text in relay.records(replace(LINES, lines=tuple(["x" * 99] * 9)))]
    assert first == ["x" * 99] * 9
    level, text = list(relay.records(replace(LINES, lines=("fits" * 10, "y" * 99, "short"))))[-1]
    assert (level, text) == (
        logging.WARNING,
        "The rest of the log is not shown here; see http://dstack/run",
    )
    assert list(relay.records(replace(LINES, lines=("z" * 999_999,)))) == []
    assert relay.tail[-4:] == ["fits" * 10, "y" * 99, "short", "z" * 500]
    assert relay.state() == {"tail": relay.tail, "relayed_bytes": 941, "left_out_bytes": 1_000_106}
    assert next(text for _, text in relay.records(RunFinished(PROGRESS, OUTCOME))) == (
        "... 1.0 MB of log not shown; see http://dstack/run"
    )


def test_another_process_goes_on_with_the_same_budget() -> None:
    relay = Relay(log_budget_bytes=10)
    assert len(list(relay.records(LINES))) == 2
    later = Relay(**relay.state(), log_budget_bytes=10)
    assert [level for level, _ in later.records(LINES)] == [logging.WARNING]
    last = Relay(**later.state(), log_budget_bytes=10)
    assert list(last.records(LINES)) == []
    assert last.state()["left_out_bytes"] == 16


def test_no_budget_shows_all() -> None:
    relay = Relay()
    texts = [text for _, text in relay.records(replace(LINES, lines=tuple(["x" * 999] * 99)))]
    assert sum(text.count("x") for text in texts) == 999 * 99
    assert relay.state()["left_out_bytes"] == 0


def test_secrets_are_hidden_in_records_and_in_the_tail() -> None:
    secrets = ["hunter2.+", "hunter2.+longer", "two lines\nof a key", "abc"]
    relay = Relay(["was hunter2.+ there"], secrets=secrets)
    lines = ("it is hunter2.+", "or hunter2.+longer!", "two lines", "of a key", "abc")
    texts = [text for _, text in relay.records(replace(LINES, lines=lines))]
    assert texts == ["it is ***", "or ***!", "***", "***", "abc"]
    assert relay.tail == ["was *** there", *texts]


def test_statuses_and_faults_are_told() -> None:
    relay = Relay()
    assert list(relay.records(StatusChanged(PROGRESS, RunStatus.RUNNING, None, "pulling"))) == [
        (logging.INFO, "Run af-1 is running (pulling)")
    ]
    assert list(relay.records(StatusChanged(PROGRESS, RunStatus.DONE, None, None))) == []
    level, text = next(relay.records(ContactLost(PROGRESS, "no answer from X", 5.0, 595.0)))
    assert (level, text) == (
        logging.WARNING,
        "no answer from X; the run goes on, trying again for another 595 s",
    )
    assert list(relay.records(RunFinished(PROGRESS, OUTCOME))) == [
        (logging.INFO, "Run af-1 finished, machine g5.xlarge (aws), 61 s, 0.25 USD")
    ]
