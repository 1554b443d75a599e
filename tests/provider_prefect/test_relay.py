"""Log lines and events in the run logger."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest

from dstack_core import ContactLost, ContactRestored, LogLines, Progress, RunStatus, StatusChanged
from prefect_dstack._relay import MAX_LINE_CHARS, MAX_RECORD_CHARS, MAX_RECORD_LINES, Relay, clean, records

PROGRESS = Progress("train", "id")


def lines(*text: str, replica: int = 0, node: int = 0) -> LogLines:
    return LogLines(PROGRESS, text, replica, node, 0, "submission")


@pytest.fixture
def relay(caplog: pytest.LogCaptureFixture) -> Relay:
    caplog.set_level(logging.INFO)
    return Relay(logging.getLogger("relay-test"), stream_logs=True)


def test_many_lines_make_few_records_and_none_is_lost() -> None:
    given = [f"line {number}" for number in range(1000)]
    made = list(records(given))
    assert len(made) == 5
    assert "\n".join(made).split("\n") == given


def test_records_stay_within_their_limits() -> None:
    given = ["x" * 1000 for _ in range(100)]
    for record in records(given):
        assert len(record) <= MAX_RECORD_CHARS
        assert record.count("\n") < MAX_RECORD_LINES


def test_a_long_line_is_a_record_of_its_own_and_is_cut() -> None:
    cut = clean("y" * 30_000)
    assert len(cut) < 25_000
    assert cut.endswith(f"[... {30_000 - MAX_LINE_CHARS} characters cut]")
    assert list(records(["before", cut, "after"])) == ["before", cut, "after"]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[1;32mgreen\x1b[0m", "green"),
        ("\x1b]0;title\x07text", "text"),
        ("nul\x00byte", "nul\ufffdbyte"),
        ("tab\tstays", "tab\tstays"),
        ("unicode ✓ 日本", "unicode ✓ 日本"),
        ("100% [%s]", "100% [%s]"),
    ],
)
def test_lines_are_made_fit_to_show(raw: str, shown: str) -> None:
    assert clean(raw) == shown


def test_lines_are_logged_in_order_and_percent_signs_are_no_formats(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    relay.handle(lines("a %s", "b"))
    relay.handle(lines("c", node=1))
    assert caplog.messages == ["a %s\nb", "[0/1] c"]
    assert relay.progress == PROGRESS


def test_without_streaming_the_last_lines_are_still_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    relay = Relay(logging.getLogger("relay-test"), stream_logs=False)
    relay.handle(lines(*(str(number) for number in range(50))))
    assert caplog.messages == []
    assert list(relay.tail) == [str(number) for number in range(30, 50)]


def test_what_was_told_before_is_not_told_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    told = Counter(["same", "same", "once"])
    relay = Relay(logging.getLogger("relay-test"), stream_logs=True, relayed=told)
    relay.handle(lines("same", "once", "same"))
    relay.handle(lines("same", "new"))
    assert caplog.messages == ["same\nnew"]


def test_statuses_are_logged_with_the_servers_word(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    relay.handle(StatusChanged(PROGRESS, RunStatus("pending"), None, "retrying"))
    relay.handle(StatusChanged(PROGRESS, RunStatus("running"), None, None))
    assert caplog.messages == ["Run train: pending (retrying)", "Run train: running"]


def test_a_long_silence_is_told_once_a_minute(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    for second in range(0, 130, 10):
        relay.handle(ContactLost(PROGRESS, "no answer", float(second), 600.0 - second))
    relay.handle(ContactRestored(PROGRESS, 130.0))
    relay.handle(ContactLost(PROGRESS, "no answer", 0.5, 600.0))
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING] * 3 + [logging.INFO, logging.WARNING]


def test_an_unknown_event_of_a_newer_core_is_no_error(relay: Relay) -> None:
    class NewEvent:
        progress: Any = PROGRESS

    relay.handle(NewEvent())  # type: ignore[arg-type]
    assert relay.progress == PROGRESS
