"""The log of an adopted run: relayed again only where it was not relayed to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from uuid import UUID

import httpx
import pytest
from prefect import flow
from prefect.runtime import flow_run

from dstack_core import Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _log_relay, arun_task, run_task

from .support import log_records, submissions
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")

TASK = Task(commands=["echo by-the-run"])


@pytest.fixture(params=["sync", "async"])
def relayed(
    request: pytest.FixtureRequest,
    dstack: LocalServer,
    credentials: DstackCredentials,
    caplog: pytest.LogCaptureFixture,
) -> Callable[[Callable[[], None]], list[int]]:
    """Return a function that executes a flow run twice, with an action between, and counts each one's lines."""
    counts: list[int] = []

    def count() -> None:
        lines = [line for record in caplog.messages for line in record.splitlines()]
        counts.append(lines.count("by-the-run"))
        caplog.clear()
        if len(counts) == 1:
            raise RuntimeError("something else failed")

    def twice(between: Callable[[], None]) -> list[int]:
        def go_on() -> None:
            if counts:
                between()

        @flow(retries=1, retry_delay_seconds=0)
        def sync() -> None:
            go_on()
            run_task(TASK, credentials, **FAST)
            count()

        @flow(retries=1, retry_delay_seconds=0)
        async def twin() -> None:
            go_on()
            await arun_task(TASK, credentials, **FAST)
            count()

        if request.param == "sync":
            sync()
        else:
            asyncio.run(twin())
        assert submissions(dstack) == 1
        return counts

    caplog.set_level(logging.INFO)
    return twice


Twice = Callable[[Callable[[], None]], list[int]]


def forget() -> None:
    """Clear what this process remembers, because another process would not know it."""
    _log_relay._by_this_process.clear()


def test_a_retried_flow_relays_no_log_twice(relayed: Twice) -> None:
    assert relayed(lambda: None) == [1, 0]


def test_another_process_finds_in_the_flow_runs_log_that_it_was_relayed(relayed: Twice) -> None:
    def arrived() -> None:
        log_records(UUID(str(flow_run.get_id())), last=" USD")
        forget()

    assert relayed(arrived) == [1, 0]


def test_a_log_that_may_not_have_been_relayed_is_relayed_again(
    relayed: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_in_log(*_: object) -> bool:
        raise httpx.ReadTimeout("silent")

    monkeypatch.setattr(_log_relay, "_is_in_log", is_in_log)
    assert relayed(forget) == [1, 1]
