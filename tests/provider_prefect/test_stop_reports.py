"""What Prefect shows of a stop: the event of an accepted one, the state after one that failed, its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run
from prefect.states import Crashed

from dstack_core import Task
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    _cancellation,
    _orphaned_runs,
    _stop,
    arun_task,
    run_task,
    stop_dstack_runs,
)
from prefect_dstack._report import emit
from prefect_dstack._stop import StopTime
from prefect_dstack._worker_variables import DstackJobConfiguration
from prefect_dstack.worker import DstackWorker

from .support import cancelled_when, event_names, is_running, the_run, until
from .test_hooks import flow_run as new_flow_run
from .test_hooks import idle, run_for
from .test_interrupts import FAST, LONG, interrupt

pytestmark = pytest.mark.usefixtures("prefect_server")

STUBBORN = Task(commands=["trap '' INT TERM; echo started; sleep 600"])
DENIED = {"detail": {"msg": "Access denied", "code": None}}


def spoil(server: LocalServer, how: str) -> None:
    """Make each stop fail: refuse it, drop it, or hide its effect."""
    if how == "refused":
        server.faults.add("/runs/stop", status=403, times=None, body=DENIED)
    elif how == "dropped":
        server.faults.forget_stops(times=None)
    else:
        server.faults.add("/runs/get", delay=30, times=None)


def once(server: LocalServer, how: str) -> Callable[[], bool]:
    """Return a condition that is true once a run is running and its stops fail."""
    done: list[bool] = []

    def spoiled() -> bool:
        if not done and is_running(server):
            spoil(server, how)
            done.append(True)
        return bool(done)

    return spoiled


def names_after(run_id: str) -> list[str]:
    """Return the names of a run's events once those that were sent before are there."""
    emit("probe", "x", run_id, {})
    until(lambda: "dstack.run.probe" in event_names(run_id), seconds=30)
    return [name for name in event_names(run_id) if name != "dstack.run.probe"]


@pytest.mark.parametrize("task", [run_task, arun_task])
@pytest.mark.parametrize("how", ["refused", "dropped", "unseen"])
def test_an_accepted_stop_has_its_event_and_a_refused_one_has_none(
    how: str,
    task: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit in ("PATIENT", "BEFORE_THE_KILL"):
        monkeypatch.setattr(_stop, limit, StopTime(stop=4.0, end=5.0))
    run = interrupt(task, dstack, once(dstack, how), LONG, credentials)
    expected = ["dstack.run.started"] + ["dstack.run.stopping"] * (how != "refused")
    assert names_after(run.id) == expected


def test_the_event_of_an_accepted_stop_does_not_wait_for_its_effect(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook stops the run here, as the reaper does; the worker has its own test."""
    monkeypatch.setattr(_orphaned_runs, "PATIENT_TIMEOUT", 3.0)
    monkeypatch.setattr(_orphaned_runs, "END_SECONDS", 1.0)
    run = run_for(dstack, new_flow_run(), f"h-{uuid4().hex[:8]}")
    until(lambda: is_running(dstack))
    dstack.faults.forget_stops(times=None)
    owner = (run.marker or "").split("/")[1]
    with get_client(sync_client=True) as api:
        stop_dstack_runs(credentials)(idle, api.read_flow_run(UUID(owner)), Crashed())
    assert names_after(run.id) == ["dstack.run.stopping"]


def test_the_worker_emits_the_event_of_an_accepted_stop_and_reports_that_it_was_dropped(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstack_core import DstackError
    from prefect_dstack import worker

    monkeypatch.setattr(worker, "PATIENT_TIMEOUT", 3.0)
    run = run_for(dstack, new_flow_run(), "machine")
    until(lambda: is_running(dstack))
    dstack.faults.forget_stops(times=None)
    machines = DstackWorker(work_pool_name="any")
    configuration = DstackJobConfiguration(credentials=credentials)
    with pytest.raises(DstackError, match="Could not confirm that run machine is stopping"):
        asyncio.run(machines.kill_infrastructure("main:machine", configuration))
    assert names_after(run.id) == ["dstack.run.stopping"]


@pytest.mark.parametrize("task", [run_task, arun_task])
@pytest.mark.parametrize("how", ["refused", "dropped", "in time"])
def test_the_state_after_a_cancellation_shows_what_is_known_of_the_stop(
    how: str,
    task: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    monkeypatch.setattr(_stop, "BEFORE_THE_KILL", StopTime(stop=4.0, end=12.0))
    ids: list[UUID] = []

    @flow
    def cancelled() -> None:
        ids.append(UUID(flow_run.get_id()))
        task.submit(LONG, credentials, **FAST).wait()

    condition = once(dstack, how) if how != "in time" else lambda: is_running(dstack)
    with cancelled_when(condition, ids):
        cancelled(return_state=True)
    run = the_run(dstack)
    state = until(lambda: ended_state(ids[0]), seconds=30)
    assert state.is_cancelled()
    message = str(state.message)
    assert message.startswith("The flow run was cancelled. ")
    if how == "in time":
        assert message == f"The flow run was cancelled. Run {run.name} was stopped on request."
    else:
        refused, unconfirmed = "The server refused to stop run", "Could not confirm that run"
        assert f"{refused if how == 'refused' else unconfirmed} {run.name}" in message
        assert ("The reaper " in message) is (how != "refused")
        assert message.endswith(f": {run.url}")
        assert "was stopped" not in message


def ended_state(flow_run_id: UUID) -> Any:
    """Return the state of a flow run's only task run, None until it has ended."""

    async def read() -> Any:
        async with get_client() as client:
            (run,) = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            )
            return run.state if run.state is not None and run.state.is_final() else None

    return asyncio.run(read())


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_slow_replies_do_not_stretch_the_stop_and_the_wait_for_the_end(
    task: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two replies of 3 s confirm the stop; 2.5 s are left for requests that would need 3 s each."""
    for limit in ("PATIENT", "BEFORE_THE_KILL"):
        monkeypatch.setattr(_stop, limit, StopTime(stop=8.0, end=8.5))

    def slow() -> bool:
        if is_running(dstack):
            dstack.faults.slow(3.0)
            return True
        return False

    run = interrupt(task, dstack, slow, STUBBORN, credentials)
    mine = [record for record in caplog.records if run.name in record.getMessage()]
    first = next(record for record in mine if record.getMessage().startswith("Stopping run"))
    last = next(record for record in mine if "has not ended yet" in record.getMessage())
    # Sending a third request and waiting for its reply would take nine seconds.
    assert last.created - first.created < 9.0
