"""Flow runs of a work pool whose machine is interrupted: scheduled again, on another machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Cancelling, Completed, Crashed, Running

from dstack_core import AsyncRun
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackWorker, _worker_evictions
from prefect_dstack._worker_runs import submit_once
from prefect_dstack._worker_variables import DstackJobConfiguration

from .machines import START_SECONDS, deploy, new_pool, read, start, the_line, worker
from .support import all_runs, outcome_of, state_of, stops, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("prefect_server")]

RESCHEDULE = {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"}


@pytest.fixture
def pool() -> str:
    """Create a work pool for one test."""
    return new_pool()


def configuration(credentials: DstackCredentials, command: str, **env: str) -> DstackJobConfiguration:
    return DstackJobConfiguration(
        credentials=credentials,
        command=command,
        env={"PREFECT_API_URL": os.environ["PREFECT_API_URL"], **env},
        poll_interval=0.2,
        spot_policy="spot",
    )


@pytest.mark.matrix
def test_an_interrupted_flow_run_completes_on_another_machine_and_keeps_its_tags(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    dstack.scenarios.interrupt_after(0, noticed_after=0)
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run_from_deployment(deploy(pool, spot_policy="spot"), tags=["nightly"])
    with worker(dstack, pool, tmp_path / "log"):
        until(lambda: state_of(flow_run.id).is_final(), seconds=START_SECONDS)
        assert the_line(flow_run, "by-print-2", "by-print-2") == 1
    assert state_of(flow_run.id).is_completed(), (tmp_path / "log").read_text()[-3000:]
    assert read(flow_run).tags == ["nightly"]
    until(lambda: all(run.outcome() for run in all_runs(dstack)), seconds=60)
    assert [outcome_of(run).category for run in all_runs(dstack)] == ["spot.interrupted", ""]
    with get_client(sync_client=True) as client:
        names = [state.name for state in client.read_flow_run_states(flow_run.id)]
    assert "AwaitingRetry" in names
    assert "Crashed" not in names


@pytest.mark.parametrize(
    ("state", "env", "expected"),
    [
        (Running(), RESCHEDULE, (0, "AwaitingRetry")),
        # Prefect marks it so if the process gets a signal that it does not know.
        (Crashed(), RESCHEDULE, (0, "AwaitingRetry")),
        (AwaitingRetry(), RESCHEDULE, (0, "AwaitingRetry")),
        (Completed(), RESCHEDULE, (0, "Completed")),
        (Cancelling(), RESCHEDULE, (0, "Cancelling")),
        (Running(), {}, (1, "Running")),
    ],
)
def test_what_becomes_of_the_flow_run_of_an_interrupted_machine(
    pool: str,
    dstack: LocalServer,
    credentials: DstackCredentials,
    state: State[Any],
    env: dict[str, str],
    expected: tuple[int, str],
    tmp_path: Path,
) -> None:
    flow_run = start(deploy(pool))
    # Long enough for the state to be set first, on a busy machine, too.
    dstack.scenarios.interrupt_after(4, noticed_after=0)
    made = configuration(credentials, "sleep 60", **env)

    async def go() -> int:
        async with DstackWorker(work_pool_name=pool) as machines:
            await machines.client.set_flow_run_state(flow_run.id, Running(), force=True)
            watching = asyncio.create_task(machines.run(flow_run, made))
            await asyncio.to_thread(until, lambda: all_runs(dstack))
            await machines.client.set_flow_run_state(flow_run.id, state, force=True)
            result = await asyncio.wait_for(watching, 60)
            await asyncio.gather(*machines._background)
            return result.status_code

    assert (asyncio.run(go()), state_of(flow_run.id).name) == expected


def test_an_interruption_that_was_handed_out_again_is_reported_by_the_next_execution(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    """The flow run is handed out again before the worker has seen the end of its machine."""
    flow_run, gate = start(deploy(pool)), tmp_path / "gate"
    is_first = f"until [ -e {gate} ]; do sleep 0.1; done; exit 3"
    command = f"case $DSTACK_RUN_NAME in *-2) exit 0;; esac; {is_first}"
    made = configuration(credentials, command, **RESCHEDULE)

    async def go() -> list[int]:
        async with DstackWorker(work_pool_name=pool) as machines:
            await machines.client.set_flow_run_state(flow_run.id, Running(), force=True)
            first = asyncio.create_task(machines.run(flow_run, made))
            await asyncio.to_thread(until, lambda: any(r.raw_status == "running" for r in all_runs(dstack)))
            again: FlowRun = await machines.client.read_flow_run(flow_run.id)
            assert again.run_count == 1
            second = asyncio.create_task(machines.run(again, made))
            await asyncio.sleep(0)
            gate.touch()
            return [(await asyncio.wait_for(each, 60)).status_code for each in (first, second)]

    assert asyncio.run(go()) == [0, 0]
    first, second = all_runs(dstack)
    assert second.name == f"{first.name}-2"
    assert [outcome_of(run).exit_status for run in (first, second)] == [3, 0]


@pytest.mark.parametrize("ends", [True, False])
def test_the_next_execution_waits_for_the_end_of_the_last_ones_machine(
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ends: bool,
) -> None:
    """One that does not end is stopped."""
    flow_run_id, gate = uuid4(), tmp_path / "gate"
    monkeypatch.setattr(_worker_evictions, "_LOOK_SECONDS", 0.1)
    if not ends:
        monkeypatch.setattr(_worker_evictions, "_END_SECONDS", 0.0)
    made = configuration(credentials, f"until [ -e {gate} ]; do sleep 0.1; done")

    async def go() -> tuple[AsyncRun, AsyncRun]:
        async with credentials.get_async_client() as client:
            first = await submit_once(client, flow_run_id, made)
            waiting: Coroutine[Any, Any, AsyncRun] = submit_once(client, flow_run_id, made, executions=1)
            second = asyncio.create_task(waiting)
            await asyncio.sleep(0)
            if ends:
                gate.touch()
            submitted = await asyncio.wait_for(second, 60)
            assert (await first.refresh()).outcome() is not None
            return first, submitted

    first, second = asyncio.run(go())
    assert second.name == f"{first.name}-2"
    assert len(all_runs(dstack)) == 2
    assert bool(stops(dstack)) != ends
