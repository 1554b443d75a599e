"""Runs that need long to end after a stop: Prefect shows their end on every path, once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from pydantic import SecretStr

from dstack_core import RunStoppedError, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _cancellation, arun_task, run_task
from prefect_dstack._cancellation import StopRequested
from prefect_dstack._job import prepare
from prefect_dstack._names import calling_owner
from prefect_dstack._secrets import GitLogin
from prefect_dstack._stop import BEFORE_THE_KILL, PATIENT, StopTime, time_to_stop
from prefect_dstack._submission import resolve

from . import ways
from .support import (
    artifacts_of,
    cancelled_when,
    event_names,
    is_running,
    outcome_of,
    stops,
    the_run,
    until,
)
from .ways import FAST, WAYS, Runner

pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    # Prefect's own alarm does not work while the test's time limit holds SIGALRM.
    pytest.mark.timeout(240, method="thread"),
]

# Longer than the five seconds that a real server never keeps (12 to 20 s: PROTOCOL 5.4).
GRACE = 8.0
STUBBORN = Task(name="train", commands=["trap '' INT TERM; echo started; sleep 600"])


@pytest.fixture
def dstack() -> Iterator[LocalServer]:
    with LocalServer(step_seconds=0.02, stop_grace_seconds=GRACE) as server:
        yield server


@pytest.fixture
def credentials(dstack: LocalServer) -> DstackCredentials:
    return DstackCredentials(
        server_url=dstack.url, project_name=dstack.project, user_token=SecretStr(dstack.token)
    )


# Long enough for the run to be shown in Prefect on a busy machine.
LIMIT_SECONDS = 6


def check_reported(dstack: LocalServer, *, artifacts: bool = True) -> None:
    """Check that Prefect shows the end of the only run, and that there is one event of it."""
    run = the_run(dstack)
    outcome = outcome_of(run)
    assert outcome.reason == "stopped_by_user"
    until(lambda: "dstack.run.terminated" in event_names(run.id), seconds=30, what="the event of the end")
    assert event_names(run.id) == ["dstack.run.started", "dstack.run.stopping", "dstack.run.terminated"]
    if artifacts:
        found = artifacts_of(UUID((run.marker or "").split("/")[1]))
        assert found["dstack-train-progress"].data == 100.0
        assert "terminated" in found["dstack-train-progress"].description
        assert "terminated" in found["dstack-train"].data


@pytest.mark.parametrize("run", WAYS)
def test_a_task_timeout_shows_the_end(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, task in (("run_task", run_task), ("arun_task", arun_task)):
        monkeypatch.setattr(ways, name, task.with_options(timeout_seconds=LIMIT_SECONDS))
    with pytest.raises(TimeoutError):
        run(STUBBORN, credentials, **FAST)
    check_reported(dstack)


@pytest.mark.parametrize("way", ["direct", "submitted", "adirect"])
def test_a_flow_timeout_shows_the_end(way: str, dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow(timeout_seconds=LIMIT_SECONDS)
    def short() -> None:
        if way == "direct":
            run_task(STUBBORN, credentials, **FAST)
        else:
            run_task.submit(STUBBORN, credentials, **FAST).result()

    @flow(timeout_seconds=LIMIT_SECONDS)
    async def ashort() -> None:
        await arun_task(STUBBORN, credentials, **FAST)

    async def awaited() -> Any:
        return await ashort(return_state=True)

    state: Any = asyncio.run(awaited()) if way == "adirect" else short(return_state=True)
    assert state.name == "TimedOut"
    check_reported(dstack)


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_cancelled_flow_run_shows_the_end_of_its_submitted_task(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    ids: list[UUID] = []

    @flow
    def cancelled() -> None:
        ids.append(UUID(flow_run.get_id()))
        task.submit(STUBBORN, credentials, **FAST).wait()

    with cancelled_when(lambda: is_running(dstack), ids):
        cancelled(return_state=True)
    check_reported(dstack)


@pytest.mark.parametrize(
    ("error", "allowed"),
    [
        (StopRequested("cancelled", cancelled=True), BEFORE_THE_KILL),
        (StopRequested("interrupted", cancelled=False), BEFORE_THE_KILL),
        (StopRequested("timed out", cancelled=True, timed_out=True), PATIENT),
        (TerminationSignal(signal=15), BEFORE_THE_KILL),
        (asyncio.CancelledError(), BEFORE_THE_KILL),
        (KeyboardInterrupt(), PATIENT),
        (ValueError("of the flow"), PATIENT),
    ],
)
def test_how_long_a_stop_may_take(
    error: BaseException, allowed: StopTime, credentials: DstackCredentials
) -> None:
    jobs: list[Any] = []

    @flow
    def preparing() -> None:
        submission = resolve(STUBBORN, {}, GitLogin())
        jobs.append(prepare(submission, run_name=None, on_crash="stop", owner=calling_owner("x")))

    preparing()
    assert time_to_stop(jobs[0], error) == allowed
    assert BEFORE_THE_KILL.stop < BEFORE_THE_KILL.end < 30.0 < PATIENT.end


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_run_that_a_user_stops_fails_its_task_with_that_reason(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    def stop() -> None:
        until(lambda: is_running(dstack))
        the_run(dstack).stop()

    @flow
    def stopped_elsewhere() -> None:
        task.submit({"type": "task", "name": "train", "commands": ["sleep 60"]}, credentials, **FAST).result()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(RunStoppedError, match="was stopped on request"):
        stopped_elsewhere()
    thread.join()
    run = the_run(dstack)
    assert stops(dstack) == 1
    until(lambda: len(event_names(run.id)) == 2, seconds=30)
    assert event_names(run.id) == ["dstack.run.started", "dstack.run.terminated"]
