"""``fallbacks``: a task moves to other machines within one execution, by runs of which one at most is alive."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from prefect import flow

from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task

from .support import log_records

pytestmark = pytest.mark.usefixtures("prefect_server")

WORK = "for i in 1 2 3; do echo step-$i; sleep 0.2; done; sleep 0.5; echo end"
TASK = {"type": "task", "commands": [WORK]}
ON_DEMAND: dict[str, Any] = {
    "spot_policy": "spot",
    "fallbacks": [{"spot_policy": "on-demand"}],
    "poll_interval": 0.2,
}


@flow
def sync_flow(credentials: DstackCredentials) -> Any:
    return run_task(TASK, credentials=credentials, **ON_DEMAND)


@flow
async def async_flow(credentials: DstackCredentials) -> Any:
    return await arun_task(TASK, credentials=credentials, **ON_DEMAND)


def ended(called: Any, *args: Any) -> Any:
    state = called(*args, return_state=True)
    return asyncio.run(state) if asyncio.iscoroutine(state) else state


@pytest.mark.parametrize("called", [sync_flow, async_flow], ids=["sync", "async"])
def test_after_an_interruption_a_task_moves_to_on_demand(
    called: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    dstack.scenarios.interrupt_after(0.7, noticed_after=0)
    state = ended(called, credentials)
    outcome = state.result()
    first, second = dstack.runs
    assert second.name == f"{first.name}-s2"
    assert second.marker == f"{first.marker}/step2"
    assert [run.configuration["spot_policy"] for run in (first, second)] == ["spot", "on-demand"]
    assert (outcome["run_name"], outcome["status"]) == (second.name, "done")
    assert [one["number"] for one in outcome["attempts"]] == [1, 2]
    records = log_records(state.state_details.flow_run_id, last=f"Run {second.name} finished")
    text = "\n".join(str(record) for record in records)
    assert re.findall(r"step-\d", text) == [*first.log, *(line for line in second.log if line != "end")]
