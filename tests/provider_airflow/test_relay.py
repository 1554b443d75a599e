"""Events become log records; what the records look like is tested in tests/core/test_relay.py."""

from __future__ import annotations

import logging
from dataclasses import replace

from airflow_provider_dstack._log_relay import DEFAULT_LOG_BUDGET, new_relay, records
from dstack_core import LogLines, Outcome, Progress, RunFinished, RunStatus, integration

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


def test_a_few_lines_are_a_record_each_and_many_are_packed() -> None:
    assert list(records(new_relay(), LINES)) == [(logging.INFO, "one"), (logging.INFO, "two")]
    many = replace(LINES, lines=tuple(map(str, range(33))))
    assert [text for _, text in records(new_relay(), many)] == ["\n".join(map(str, range(33)))]


def test_the_default_budget_is_that_of_the_core() -> None:
    assert DEFAULT_LOG_BUDGET == integration.DEFAULT_LOG_BUDGET


def test_the_outcome_is_the_last_record() -> None:
    relay = new_relay(log_budget_bytes=4)
    list(records(relay, LINES))
    assert list(records(relay, RunFinished(PROGRESS, OUTCOME))) == [
        (logging.WARNING, "4 bytes of the log is not shown here. See http://localhost/r"),
        (logging.INFO, "Run af-1 finished, 1 min 1 s on g5.xlarge (aws, us-east-1), 0.25 USD"),
    ]
