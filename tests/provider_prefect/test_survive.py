"""``survive``: interruptions at several moments use no retry of the task, and each line is relayed once."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from prefect import flow

from dstack_core import RunInterruptedError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task

from .support import log_records

pytestmark = pytest.mark.usefixtures("prefect_server")

# 1.2 s with lines, then 1 s without.
WORK = "for i in 1 2 3 4; do echo step-$i; sleep 0.3; done; sleep 1"
TASK = {"type": "task", "commands": [WORK]}
OPTIONS: dict[str, Any] = {"spot_policy": "spot", "survive": "1h", "poll_interval": 0.2}


def interrupt(dstack: LocalServer) -> None:
    """Interrupt the next attempts before the first line, amid the lines, and after the last."""
    for seconds in (0, 0.7, 1.7):
        dstack.scenarios.interrupt_after(seconds, noticed_after=0)


@flow
def sync_flow(credentials: DstackCredentials) -> Any:
    return run_task(TASK, credentials=credentials, **OPTIONS)


@flow
async def async_flow(credentials: DstackCredentials) -> Any:
    return await arun_task(TASK, credentials=credentials, **OPTIONS)


@pytest.mark.parametrize("called", [sync_flow, async_flow], ids=["sync", "async"])
def test_a_task_survives_interruptions_within_its_execution(
    called: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    interrupt(dstack)
    state = called(credentials, return_state=True)
    if asyncio.iscoroutine(state):
        state = asyncio.run(state)
    outcome = state.result() if not asyncio.iscoroutine(state.result()) else asyncio.run(state.result())
    (run,) = dstack.runs
    assert run.job_reasons == (*["interrupted_by_no_capacity"] * 3, "done_by_runner")
    assert [one["number"] for one in outcome["attempts"]] == [1, 2, 3, 4]
    records = log_records(state.state_details.flow_run_id, last="step-4")
    text = "\n".join(str(record) for record in records)
    assert re.findall(r"step-\d", text) == list(run.log)
    assert text.count("[attempt 4] step-1") == 1
    assert run.finished


def test_another_execution_continues_from_the_checkpoint_of_the_one_before(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with dstack.client() as client:
        client.volumes.apply({"name": "data", "backend": "aws", "region": "us-east-1", "size": "10GB"})
        client.volumes.wait("data", timeout=60)
    commands = [
        'mkdir -p "$DSTACK_CHECKPOINT"; cd "$DSTACK_CHECKPOINT"',
        "echo ran >> tries; test $(wc -l < tries) = 2",
    ]
    task = {"type": "task", "commands": commands, "volumes": ["data:/data"]}
    survive = {"checkpoint": "/data/checkpoints"}

    @flow(retries=1)
    def continued() -> Any:
        return run_task(task, credentials=credentials, **{**OPTIONS, "survive": survive})

    outcome: Any = continued()
    assert outcome["status"] == "done"
    assert len({run.name for run in dstack.runs}) == 2
    assert len({run.configuration["env"]["DSTACK_CHECKPOINT"] for run in dstack.runs}) == 1


def test_the_limit_fails_the_task_as_interrupted(dstack: LocalServer, credentials: DstackCredentials) -> None:
    dstack.scenarios.interrupt_after(0.2, times=9, noticed_after=0)

    @flow
    def limited() -> Any:
        return run_task(TASK, credentials=credentials, **{**OPTIONS, "survive": {"times": 1}})

    with pytest.raises(RunInterruptedError, match="survive allows 1 of them"):
        limited()
    assert [run.finished for run in dstack.runs] == [True]
