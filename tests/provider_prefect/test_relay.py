"""Log lines and events in the run logger; what they look like is tested in tests/core/test_relay.py."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest

from dstack_core import ContactLost, LogLines, Progress, RunStatus, StatusChanged, integration
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET, Relay

PROGRESS = Progress("train", "id")


def lines(*text: str, replica: int = 0, node: int = 0) -> LogLines:
    return LogLines(PROGRESS, text, replica, node, 0, "submission", nodes=node + 1)


@pytest.fixture
def relay(caplog: pytest.LogCaptureFixture) -> Relay:
    caplog.set_level(logging.INFO)
    return Relay(logging.getLogger("relay-test"), stream_logs=True)


def test_a_record_has_at_most_200_lines(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    given = [f"line {number}" for number in range(1000)]
    relay.handle(lines(*given))
    assert len(caplog.messages) == 5
    assert "\n".join(caplog.messages).split("\n") == given


def test_lines_are_logged_in_order_and_percent_signs_are_kept(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    relay.handle(lines("a %s", "b"))
    relay.handle(lines("c", node=1))
    assert caplog.messages == ["a %s\nb", "[node 1] c"]
    assert relay.progress == PROGRESS


def test_without_streaming_the_last_lines_are_still_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    relay = Relay(logging.getLogger("relay-test"), stream_logs=False)
    relay.handle(lines(*(str(number) for number in range(50))))
    assert caplog.messages == []
    assert list(relay.tail) == [str(number) for number in range(30, 50)]


def test_what_was_logged_before_is_not_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    told = Counter(["same", "same", "once"])
    relay = Relay(logging.getLogger("relay-test"), stream_logs=True, relayed=told)
    relay.handle(lines("same", "once", "same"))
    relay.handle(lines("same", "new"))
    assert caplog.messages == ["same\nnew"]


def test_levels_are_those_of_the_events_and_a_fault_has_no_position(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    relay.handle_contact(ContactLost(Progress("other"), "no answer", 0.5, 600.0))
    assert relay.progress is None
    relay.handle(StatusChanged(PROGRESS, RunStatus("pending"), None, "retrying"))
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "no answer. Retrying for another 600 s."),
        (logging.INFO, "Run train: pending (retrying)"),
    ]


def test_the_end_is_known_and_what_was_left_out_is_linked(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    relay.note_page("http://dstack/run")
    relay.handle(lines("x" * (DEFAULT_LOG_BUDGET - 2), "not shown"))
    assert caplog.messages[-1] == (
        "The log is longer than its budget of 10.0 MB; the rest is not shown here. See http://dstack/run"
    )
    assert relay.tail == ["x" * 500, "not shown"]
    assert relay.outcome is None


def test_the_default_budget_is_that_of_the_core() -> None:
    assert DEFAULT_LOG_BUDGET == integration.DEFAULT_LOG_BUDGET


def test_an_unknown_event_of_a_newer_core_is_ignored(relay: Relay) -> None:
    class NewEvent:
        progress: Any = PROGRESS

    relay.handle(NewEvent())  # type: ignore[arg-type]
    assert relay.progress == PROGRESS
