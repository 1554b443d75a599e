"""The log of an adopted run: relayed again only where it was not relayed to its end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import LogCreate
from prefect.runtime import flow_run

from dstack_core import Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _log_relay, arun_task, run_task

from .support import log_records, submissions, until
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


def interrupted(
    task: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    file: Path,
    caplog: pytest.LogCaptureFixture,
) -> tuple[list[str], int]:
    """Follow a run in two tries of one task run, of which the first loses the server.

    Returns the lines of the run that were logged, and the count of submissions.
    """
    caplog.set_level(logging.INFO)
    commands = [
        "echo equal; echo equal; echo before",
        f"while [ ! -e {file} ]; do sleep 0.1; done; echo equal",
    ]

    def lose_the_server(run_id: UUID) -> None:
        log_records(run_id, last="before")
        fault = dstack.faults.add("/runs/get", status=503, times=None)
        until(lambda: "is no longer followed" in caplog.text)
        file.touch()
        fault.times = 1

    @flow
    def retrying() -> None:
        thread = threading.Thread(target=lose_the_server, args=(UUID(str(flow_run.get_id())),))
        thread.start()
        again = task.with_options(retries=3, retry_delay_seconds=1)
        again.submit(Task(commands=commands), credentials, retry_budget=0.5, **FAST).result()
        thread.join()

    retrying()
    lines = [line for record in caplog.messages for line in record.splitlines()]
    return [line for line in lines if line in ("equal", "before")], submissions(dstack)


BOTH = pytest.mark.parametrize("task", [run_task, arun_task])


@BOTH
def test_another_try_of_a_task_run_continues_behind_the_lines_that_its_log_has(
    task: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = interrupted(task, dstack, credentials, tmp_path / "go", caplog)
    assert found == (["equal", "equal", "before", "equal"], 1)


@BOTH
def test_a_log_that_prefect_does_not_return_is_relayed_from_its_first_line(
    task: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lines_since(*_: object) -> Counter[str]:
        raise httpx.ReadTimeout("silent")

    monkeypatch.setattr(_log_relay, "_lines_since", lines_since)
    found = interrupted(task, dstack, credentials, tmp_path / "go", caplog)
    assert found == (["equal", "equal", "before"] * 2 + ["equal"], 1)


def test_lines_of_an_earlier_run_of_the_task_run_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # More than one page.
    monkeypatch.setattr(_log_relay, "_PAGE", 2)
    messages = ["Run a: http://1", "equal", "Run a: running", "Run a: http://2", "equal\nother", "equal"]
    task_run_id, now = uuid4(), datetime.now(UTC)
    with get_client(sync_client=True) as client:
        client.create_logs(
            LogCreate(
                name="prefect.task_runs",
                level=logging.INFO,
                message=message,
                timestamp=now + timedelta(milliseconds=number),  # type: ignore[arg-type]  # a subclass of Prefect
                task_run_id=task_run_id,
            )
            for number, message in enumerate(messages)
        )
    assert _log_relay._lines_since("Run a: http://2", task_run_id) == {
        "Run a: http://2": 1,
        "equal": 2,
        "other": 1,
    }
