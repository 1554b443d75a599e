"""What a run waits for, on the embedded server, whose events are like a real one's."""

from __future__ import annotations

import asyncio

import pytest

from dstack_core import AsyncClient, Client, Event, Task, Waiting
from dstack_core.local import LocalServer


@pytest.mark.parametrize("twin", [False, True])
def test_a_run_that_waits_reports_it_from_its_own_fields_and_the_events(twin: bool) -> None:
    task = Task(commands=["true"], image="python:3.12-slim")
    with LocalServer(step_seconds=1.0) as server:

        async def afollowed() -> list[Event]:
            async with AsyncClient(
                server_url=server.url, project_name=server.project, user_token=server.token
            ) as client:
                run = await client.runs.submit(task)
                return [one async for one in run.follow(poll_interval=0.1, waiting_interval=0.3)]

        def followed() -> list[Event]:
            with Client(
                server_url=server.url, project_name=server.project, user_token=server.token
            ) as client:
                return list(client.runs.submit(task).follow(poll_interval=0.1, waiting_interval=0.3))

        events = asyncio.run(afollowed()) if twin else followed()
    reports = [event for event in events if isinstance(event, Waiting)]
    kinds = [event.text.split()[0].rstrip(":") for event in reports]
    assert list(dict.fromkeys(kinds)) == ["capacity", "machine", "image"]
    assert reports[-1].text.startswith("image python:3.12-slim")
    # Each step has its own time: that of the event with which it began.
    sinces = {
        kind: {one.since for one, other in zip(reports, kinds, strict=True) if other == kind}
        for kind in kinds
    }
    assert all(len(found) == 1 for found in sinces.values())
    first, second, third = (min(found) for found in sinces.values())
    assert first < second < third
