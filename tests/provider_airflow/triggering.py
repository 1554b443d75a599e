"""Make a trigger, run it, and end it as a triggerer does, without Airflow's components."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import Progress, Run
from dstack_core.local import LocalServer
from tests.provider_airflow.support import wait_for


def submitted(server: LocalServer, command: str) -> Run:
    return server.client().runs.submit(
        {"type": "task", "commands": [command]}, run_name="deferred", marker="ours"
    )


def trigger_for(run: Run, **change: Any) -> DstackRunTrigger:
    arguments: dict[str, Any] = {
        "dstack_conn_id": "dstack_default",
        "project_name": None,
        "run_name": run.name,
        "marker": run.marker,
        "progress": Progress(run.name, run.id).to_dict(),
        "poll_interval": 0.1,
    }
    trigger = DstackRunTrigger(**{**arguments, **change})
    trigger.task_instance = SimpleNamespace(  # type: ignore[assignment]  # what is used of one
        id="ti", dag_id="d", run_id="r", task_id="train", try_number=1, map_index=-1
    )
    return trigger


async def payloads(trigger: DstackRunTrigger) -> list[Any]:
    return [event.payload async for event in trigger.run()]


async def killed(trigger: DstackRunTrigger, after: Callable[[], object]) -> None:
    """Cancel a trigger as Airflow's triggerer does: again and again, also inside ``on_kill``."""

    async def runner() -> None:
        try:
            await payloads(trigger)
        except asyncio.CancelledError:
            await asyncio.wait_for(trigger.on_kill(), 30)
            raise

    task = asyncio.create_task(runner())
    await asyncio.to_thread(wait_for, "moment to kill", after)
    while not task.done():
        task.cancel("user-action")
        await asyncio.sleep(0.2)
    with pytest.raises(asyncio.CancelledError):
        await task


async def until(trigger: DstackRunTrigger, moment: Callable[[], object]) -> None:
    """Run a trigger up to a moment, then cancel it as an ending triggerer does."""
    task = asyncio.create_task(payloads(trigger))
    await asyncio.to_thread(wait_for, "moment to end", moment)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
