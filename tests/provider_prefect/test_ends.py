"""Every end of a run in a flow run's log: one line with time and cost, its last lines and its category once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.runtime import flow_run

from dstack_core import RunError, Task
from dstack_core.integration import describe_outcome
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    DstackRun,
    arun_task,
    dstack_task,
    run_task,
    submit_run,
    wait_for_run,
)

from .support import all_runs, artifacts_of, events_of, is_running, log_records, outcome_of, the_run, until
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")

Way = Callable[[str, DstackCredentials], Any]


def by_task(command: str, credentials: DstackCredentials) -> Any:
    return run_task(Task(name="train", commands=[command]), credentials, **FAST)


def by_async_task(command: str, credentials: DstackCredentials) -> Any:
    return arun_task.submit(Task(name="train", commands=[command]), credentials, **FAST).result()


def by_watching(command: str, credentials: DstackCredentials) -> Any:
    run = submit_run(Task(name="train", commands=[command]), credentials)
    return wait_for_run(run, credentials, artifacts=True, **FAST)


def by_decorator(command: str, credentials: DstackCredentials) -> Any:
    @dstack_task(credentials=credentials, configuration=Task(name="train", commands=[command]), **FAST)
    def nothing() -> int:
        return 3

    return nothing()


def by_block(command: str, credentials: DstackCredentials) -> Any:
    configuration = {"type": "task", "name": "train", "commands": [command]}
    handle = DstackRun(credentials=credentials, configuration=configuration, **FAST).trigger()
    handle.wait_for_completion()
    return handle.fetch_result()


def log_of(way: Way, command: str, credentials: DstackCredentials) -> tuple[UUID, list[str], Any]:
    """Return the flow run, its log and its state."""
    ids: list[UUID] = []

    @flow
    def ending() -> None:
        ids.append(UUID(flow_run.get_id()))
        way(command, credentials)

    state = ending(return_state=True)
    return ids[0], log_records(ids[0], last="Finished in state"), state


@pytest.mark.parametrize(
    ("way", "status"),
    [(by_task, 0), *((way, 3) for way in (by_task, by_async_task, by_watching, by_decorator, by_block))],
)
def test_each_end_is_one_line_with_time_and_cost_and_the_tail_is_there_once(
    way: Way, status: int, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    # Prefect logs a traceback, which quotes the line of this file.
    command = "echo THE-LAST-WORDS | tr A-Z a-z" + (f"; exit {status}" if status else "")
    _, records, state = log_of(way, command, credentials)
    assert state.is_failed() == bool(status)
    outcome = outcome_of(the_run(dstack))
    assert records.count(describe_outcome(outcome)) == 1
    assert describe_outcome(outcome).endswith(" USD")
    assert sum(text.count("the-last-words") for text in records) == 1


def test_a_run_that_is_stopped_meanwhile_has_the_line_too(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    def stop() -> None:
        until(lambda: is_running(dstack))
        the_run(dstack).stop()

    thread = threading.Thread(target=stop)
    thread.start()
    _, records, _ = log_of(by_task, "sleep 60", credentials)
    thread.join()
    outcome = outcome_of(the_run(dstack))
    assert outcome.category == "stopped.by_user"
    assert records.count(describe_outcome(outcome)) == 1


@pytest.mark.parametrize(
    ("command", "category"),
    [
        # The shell itself, and a process that it waits for.
        ("kill -9 $$", "user.killed"),
        ("sh -c 'kill -9 $$'; exit", "user.out_of_memory"),
    ],
)
def test_error_event_artifact_and_outcome_agree_on_the_category(
    command: str, category: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    flow_run_id, _, state = log_of(by_task, command, credentials)
    error = state.result(raise_on_failure=False)
    assert isinstance(error, RunError)
    run = the_run(dstack)
    assert outcome_of(run).category == error.outcome.category == category
    assert f"({category})" in str(error)
    ended = until(
        lambda: [one for one in events_of(run.id) if one["event"] == "dstack.run.failed"], seconds=30
    )
    assert ended[0]["resource"]["dstack.category"] == ended[0]["payload"]["category"] == category
    table = artifacts_of(flow_run_id)["dstack-train"]
    assert table.metadata_["dstack.category"] == category
    assert f"| Category | {category} |" in table.data


def test_a_wrong_input_is_reported_once(dstack: LocalServer, credentials: DstackCredentials) -> None:
    def wrong(command: str, credentials: DstackCredentials) -> Any:
        return run_task(Task(commands=[command]), credentials, max_price=-17.25)

    _, records, state = log_of(wrong, "true", credentials)
    assert state.is_failed()
    assert all_runs(dstack) == []
    # Those of Prefect: of the task, of its state, of the flow, of its state. None of ours, and no cause.
    errors = [text for text in records if "got -17.25" in text]
    prefects = ("Task run failed with exception", "Encountered exception", "Finished in state")
    assert [text for text in errors if not text.startswith(prefects)] == []
    assert not any("another exception" in text or "direct cause" in text for text in errors)
