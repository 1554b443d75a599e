"""A flow's tasks on a real dstack server: lines, outcome, failure, and a stop when the time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow
from prefect.runtime import flow_run
from pydantic import SecretStr

from dstack_core import RunFailedError, RunStatus
from prefect_dstack import DstackCredentials, arun_task, run_task
from tests.provider_prefect.support import log_records, until
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
