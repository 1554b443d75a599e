"""Nothing is submitted for a flow run that was cancelled or has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    DstackRun,
    _cancellation,
    arun_task,
    asubmit_run,
    run_task,
    submit_run,
)

from .support import all_runs, cancelled_when, is_running, set_state, submissions, task_states, until

pytestmark = pytest.mark.usefixtures("prefect_server")

LONG = {"type": "task", "commands": ["sleep 60"]}
QUICK = {"type": "task", "commands": ["true"]}
FAST: dict[str, Any] = {"poll_interval": 0.2}


def in_flow_of_state(make: Callable[[], State[Any]], body: Callable[[], Any]) -> UUID:
    """Run ``body`` in a flow run that was set to a state before; return its id."""
    ids: list[UUID] = []

    @flow
    def stated() -> Any:
        ids.append(UUID(flow_run.get_id()))
        set_state(ids[0], make())
        return body()

    stated(return_state=True)
    return ids[0]


@pytest.mark.parametrize("task", [run_task, arun_task, submit_run, asubmit_run])
@pytest.mark.parametrize("submitted", [False, True])
def test_a_cancelled_flow_run_submits_nothing(
    task: Any, submitted: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    def body() -> None:
        if submitted or task in (arun_task, asubmit_run):
            task.submit(QUICK, credentials).wait()
        else:
            task(QUICK, credentials, return_state=True)

    flow_run_id = in_flow_of_state(Cancelling, body)
    until(lambda: task_states(flow_run_id) == ["CANCELLED"], seconds=20)
    assert submissions(dstack) == 0


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (Cancelled, 0),
        (Crashed, 0),
        (Failed, 0),
        (lambda: Failed(name="TimedOut"), 0),
        # A flow may return before the tasks that it submitted; Prefect lets these finish.
        (Completed, 1),
    ],
)
def test_a_flow_run_that_ended_submits_nothing(
    make: Callable[[], State[Any]], count: int, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    in_flow_of_state(make, lambda: submit_run.submit(QUICK, credentials).wait())
    assert submissions(dstack) == count


def test_a_subflow_of_a_cancelled_flow_run_submits_nothing(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def child() -> None:
        submit_run(QUICK, credentials)

    in_flow_of_state(Cancelling, lambda: child(return_state=True))
    assert submissions(dstack) == 0


@pytest.mark.parametrize("twin", [False, True])
def test_a_triggered_block_of_a_cancelled_flow_run_submits_nothing(
    twin: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    block = DstackRun(credentials=credentials, configuration=QUICK)

    def body() -> Any:
        return asyncio.run(block.atrigger()) if twin else block.trigger()

    with pytest.raises(_cancellation.StopRequested, match="the flow run was cancelled"):
        in_flow_of_state(Cancelling, body)
    assert submissions(dstack) == 0


def test_a_queued_task_submits_nothing_after_a_cancellation(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A freed thread starts the next task, as freed workers of Dask and Ray do."""
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    ids: list[UUID] = []

    one_thread: Any = ThreadPoolTaskRunner(max_workers=1)

    @flow(task_runner=one_thread)
    def queued() -> None:
        ids.append(UUID(flow_run.get_id()))
        for future in [run_task.submit(LONG, credentials, **FAST) for _ in range(3)]:
            future.wait()

    with cancelled_when(lambda: is_running(dstack), ids):
        queued(return_state=True)
    until(lambda: task_states(ids[0]) == ["CANCELLED"] * 3, seconds=20)
    assert submissions(dstack) == 1


def test_an_active_run_of_an_earlier_execution_is_stopped(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    """The run that the flow run kept when it crashed is found and stopped when it is cancelled."""

    ids: list[UUID] = []

    @flow
    def twice() -> None:
        ids.append(UUID(flow_run.get_id()))
        submit_run(LONG, credentials, on_crash="keep")
        until(lambda: is_running(dstack))
        set_state(ids[0], Cancelling())
        # Another execution counts its tasks from the start, so this process forgets the first task.
        from prefect_dstack import _names

        _names._ordinals._seen.clear()
        run_task(LONG, credentials, on_crash="keep", return_state=True, **FAST)

    twice(return_state=True)
    assert submissions(dstack) == 1
    (run,) = all_runs(dstack)
    until(lambda: run.refresh().outcome() is not None, seconds=20)


def test_an_unreachable_prefect_server_does_not_prevent_a_submission(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: Any, flow_run_id: UUID) -> None:
        raise ConnectionError("no Prefect server")

    monkeypatch.setattr(_cancellation.FlowRunReader, "_read", unreachable)
    in_flow_of_state(Cancelling, lambda: submit_run(QUICK, credentials))
    assert submissions(dstack) == 1
