"""Interrupted and cancelled flow runs inside this process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.runtime import flow_run

from dstack_core import Run, RunStatus, Task
from dstack_core.aio import AsyncRunCollection
from dstack_core.client import RunCollection
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _cancellation, arun_task, run_task
from prefect_dstack._stop import PATIENT

from .support import all_runs, cancelled_when, is_running, outcome_of, task_states, the_run, until

pytestmark = pytest.mark.usefixtures("prefect_server")

LONG = Task(commands=["echo started; sleep 60"])
FAST: dict[str, Any] = {"poll_interval": 0.2}


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def press_control_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def asked(server: LocalServer, path: str) -> int:
    return sum(request.path.endswith(path) for request in server.requests)


def interrupt(
    task: Any, server: LocalServer, when: Callable[[], bool], *arguments: Any, **options: Any
) -> Run:
    """Press Ctrl-C as soon as ``when`` holds while a flow runs ``task``; return the only run."""

    @flow
    def sync_flow() -> None:
        task(*arguments, **FAST, **options)

    @flow
    async def async_flow() -> None:
        await task(*arguments, **FAST, **options)

    def press() -> None:
        until(when)
        press_control_c()

    def run() -> None:
        if task is arun_task:
            asyncio.run(async_flow())
        else:
            sync_flow()

    thread = in_background(press)
    with pytest.raises(KeyboardInterrupt):
        run()
    thread.join()
    return the_run(server)


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_an_interrupt_stops_the_run_and_shows_its_last_lines(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    configuration = Task(
        commands=["trap 'echo saved; exit 1' INT; echo started; while true; do sleep 0.1; done"]
    )
    run = interrupt(task, dstack, lambda: "started" in caplog.text, configuration, credentials)
    assert outcome_of(run).reason == "stopped_by_user"
    assert "saved" in caplog.messages


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_an_interrupt_during_the_submission_leaves_nothing_running(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is slow and handles the submission after its client was interrupted."""
    submitting = threading.Event()

    def late(spec: Any) -> None:
        time.sleep(1.5)
        with dstack.client() as client:
            submit(client.runs, **spec)

    def hanging(runs: Any, *, sleep: Any, on_event: Any, **spec: Any) -> Any:
        threading.Thread(target=late, args=(spec,)).start()
        submitting.set()
        return asyncio.sleep(60) if task is arun_task else time.sleep(60)

    submit = RunCollection.submit
    monkeypatch.setattr(AsyncRunCollection if task is arun_task else RunCollection, "submit", hanging)
    run = interrupt(task, dstack, submitting.is_set, LONG, credentials)
    until(lambda: run.status().is_finished, seconds=15)
    assert outcome_of(run).reason == "stopped_by_user"


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_an_interrupt_leaves_a_run_that_is_to_be_kept(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    run = interrupt(task, dstack, lambda: is_running(dstack), LONG, credentials, on_crash="keep")
    assert run.status() is RunStatus.RUNNING
    assert asked(dstack, "/runs/stop") == 0


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_second_interrupt_ends_the_wait_and_is_logged_last(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    dstack.faults.add("/runs/stop", delay=20, times=None)

    @flow
    def stuck() -> None:
        task(LONG, credentials, **FAST)

    @flow
    async def astuck() -> None:
        await task(LONG, credentials, **FAST)

    def press_twice() -> None:
        until(lambda: is_running(dstack))
        press_control_c()
        until(lambda: asked(dstack, "/runs/stop") == 1)
        press_control_c()

    thread = in_background(press_twice)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(astuck()) if task is arun_task else stuck()
    thread.join()
    assert asked(dstack, "/runs/stop") == 1
    run = the_run(dstack)
    mine = [message for message in caplog.messages if run.name in message]
    assert mine[-1].startswith(f"The stop of run {run.name} was interrupted. It may keep running")
    assert mine[-1].endswith(run.url)


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_an_unreachable_server_delays_the_end_only_for_a_short_time(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing kills a script after Ctrl-C, but the wait for a server that does not confirm the stop has a limit."""
    interrupted: list[float] = []

    def fall_silent() -> bool:
        if is_running(dstack):
            dstack.faults.add("/runs/get", status=503, times=None)
            interrupted.append(time.monotonic())
        return bool(interrupted)

    run = interrupt(task, dstack, fall_silent, LONG, credentials)
    assert time.monotonic() - interrupted[0] < PATIENT.stop + 15
    # An async task is cancelled and gets no KeyboardInterrupt.
    reason = "Ctrl-C" if task is run_task else "the task was cancelled"
    assert f"Stopping run {run.name} ({reason}): {run.url}" in caplog.text
    assert "The reaper (prefect-dstack reap)" in caplog.text
    assert "Could not confirm that run" in caplog.text
    assert "dstack stop" not in caplog.text


def cancelled_flow(body: Callable[[], Any], server: LocalServer) -> UUID:
    """Run a flow and cancel it through Prefect's API once a run is going; return its id."""
    ids: list[UUID] = []

    @flow
    def cancelled() -> Any:
        ids.append(UUID(flow_run.get_id()))
        return body()

    with cancelled_when(lambda: is_running(server), ids):
        cancelled(return_state=True)
    return ids[0]


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_task_that_no_signal_reaches_ends_as_cancelled_and_is_not_retried(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    eager = task.with_options(retries=2, retry_delay_seconds=0)
    flow_run_id = cancelled_flow(lambda: eager.submit(LONG, credentials, **FAST).wait(), dstack)
    until(lambda: task_states(flow_run_id) == ["CANCELLED"], seconds=20)
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"


def test_a_cancelled_flow_run_stops_a_run_that_would_outlive_a_crash(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    cancelled_flow(lambda: run_task.submit(LONG, credentials, on_crash="keep", **FAST).wait(), dstack)
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"


def test_an_interrupted_submitted_task_leaves_a_run_that_is_to_be_kept(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    futures: list[Any] = []

    @flow
    def interrupted() -> None:
        futures.append(run_task.submit(LONG, credentials, on_crash="keep", **FAST))
        futures[0].wait()

    def press() -> None:
        until(lambda: is_running(dstack))
        press_control_c()

    thread = in_background(press)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    thread.join()
    assert "running" in futures[0].state.message
    assert the_run(dstack).status() is RunStatus.RUNNING
    assert asked(dstack, "/runs/stop") == 0


def test_a_cancellation_is_seen_while_the_server_takes_no_submissions(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    dstack.faults.add("/runs/apply", status=503, times=None)
    ids: list[UUID] = []

    @flow
    def cancelled() -> None:
        ids.append(UUID(flow_run.get_id()))
        run_task.submit(LONG, credentials, **FAST).wait()

    with cancelled_when(lambda: asked(dstack, "/runs/apply") > 0, ids):
        cancelled(return_state=True)
    assert all_runs(dstack) == []
    until(lambda: task_states(ids[0]) == ["CANCELLED"], seconds=20)
