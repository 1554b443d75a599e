"""A flow's tasks on a real dstack server: lines, outcome, failure, and a stop when the time is up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, unmapped
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelling
from pydantic import SecretStr

from dstack_core import Client, Run, RunFailedError, RunStatus
from prefect_dstack import DstackCredentials, arun_task, run_task
from tests.provider_prefect.machines import deploy, new_pool, read, start, the_line, worker
from tests.provider_prefect.support import log_records, state_of, until
from tests.rig.server import RealServer

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture(scope="module")
def real() -> Iterator[RealServer]:
    with RealServer() as server:
        yield server


@pytest.fixture
def block(real: RealServer) -> DstackCredentials:
    return DstackCredentials(server_url=real.url, project_name=real.project, user_token=SecretStr(real.token))


def task_of(real: RealServer, *commands: str) -> dict[str, Any]:
    return {"type": "task", "commands": list(commands), "user": "root", "fleets": [real.fleet]}


def test_a_task_on_a_real_server(real: RealServer, block: DstackCredentials) -> None:
    @flow
    def steps() -> tuple[Any, Any]:
        done = run_task(
            task_of(real, "for i in 1 2 3; do echo step-$i; sleep 1; done"), block, poll_interval=0.5
        )
        return flow_run.id, done

    flow_run_id, outcome = steps()
    assert (outcome["status"], outcome["exit_status"]) == ("done", 0)
    words = "\n".join(log_records(flow_run_id, last="step-3")).split()
    assert [word for word in words if word.startswith("step-")] == ["step-1", "step-2", "step-3"]


def test_a_failing_async_task_on_a_real_server(real: RealServer, block: DstackCredentials) -> None:
    @flow
    async def fails() -> None:
        await arun_task(task_of(real, "echo before", "exit 7"), block, poll_interval=0.5)

    with pytest.raises(RunFailedError, match="exited with status 7"):
        asyncio.run(fails())


def test_a_timeout_stops_the_run_on_a_real_server(real: RealServer, block: DstackCredentials) -> None:
    limited = run_task.with_options(timeout_seconds=5)

    @flow
    def hangs() -> None:
        limited(task_of(real, "echo started", "sleep 600"), block, run_name="pf-hangs", poll_interval=0.5)

    with pytest.raises(TimeoutError):
        hangs()
    with block.get_client() as client:
        run = client.runs.get("pf-hangs")
        assert run is not None
        until(lambda: run.status().is_finished, seconds=120, what="the end of the run")
        assert run.status() == RunStatus.TERMINATED


def test_a_flow_run_on_a_machine_of_a_real_server(real: RealServer, tmp_path: Path) -> None:
    pool = new_pool()
    # With a Python instead of an image the server asks no registry.
    further = {"python": "3.11", "user": "root", "fleets": [real.fleet]}
    machine = start(deploy(pool, configuration=further, max_duration="10m"))
    with worker(real, pool, tmp_path / "log"):
        until(lambda: state_of(machine.id).is_final(), seconds=180)
        assert state_of(machine.id).is_completed(), (tmp_path / "log").read_text()[-3000:]
        assert [the_line(machine, word, "by-print-2") for word in ("by-the-logger", "by-print-1")] == [1, 1]
        project, _, run_name = (read(machine).infrastructure_pid or "").partition(":")
        assert project == real.project
        with Client(server_url=real.url, project_name=real.project, user_token=real.token) as client:
            run = client.runs.get(run_name)
            assert run is not None
            assert run.wait(timeout=60).succeeded


def test_a_cancelled_flow_run_stops_its_mapped_runs_on_a_real_server(
    real: RealServer, block: DstackCredentials
) -> None:
    """Signals do not reach the three threads: each stops its own run."""
    ids: list[UUID] = []
    configurations = [task_of(real, f"echo started-{number}", "sleep 600") for number in range(3)]

    @flow
    def mapped() -> None:
        ids.append(UUID(flow_run.get_id()))
        run_task.map(configurations, credentials=unmapped(block), poll_interval=0.5).wait()

    def cancel_when_running() -> None:
        with block.get_client() as client:
            until(lambda: len(mine(client)) == 3, seconds=120)
            until(lambda: all(run.raw_status == "running" for run in mine(client)), seconds=120)
        with get_client(sync_client=True) as api:
            api.set_flow_run_state(ids[0], Cancelling())

    def mine(client: Client) -> list[Run]:
        prefix = f"prefect:flow_run/{ids[0]}/" if ids else "?"
        return [run for run in client.runs.list(all=True) if (run.marker or "").startswith(prefix)]

    thread = threading.Thread(target=cancel_when_running)
    thread.start()
    mapped(return_state=True)
    thread.join()
    with block.get_client() as client:
        until(lambda: all(run.outcome() for run in mine(client)), seconds=120)
        assert {run.refresh().raw_status for run in mine(client)} == {"terminated"}
