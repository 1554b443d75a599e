"""Shared polls rely on this: a page of active runs shows the same as a request for one run."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import dstack_core as dstack
from dstack_core._wire.api import Api
from dstack_core._wire.lookups import active_page, lookup_of
from dstack_core._wire.runs import RunSnapshot
from tests.contract.conftest import Target
from tests.local.support import wait_until


def test_a_page_of_active_runs_shows_what_a_single_poll_shows(
    target: Target, client: dstack.Client, tmp_path: Path
) -> None:
    name, flag = f"sl-{uuid.uuid4().hex[:12]}", tmp_path / "go"
    run = client.runs.submit(
        target.task(f"until [ -e {flag} ]; do sleep 0.05; done"), run_name=name, marker="shared"
    )
    api = Api(target.url, target.project)
    # While a run starts, its status may change between the two polls.
    wait_until(lambda: run.refresh().raw_status == "running", seconds=target.timeout)

    def alone(run_id: str | None) -> RunSnapshot | None:
        call = api.get_run(name, run_id)
        return call.parse(client._transport(call.request))

    def on_page(run_id: str | None) -> RunSnapshot | None:
        page = active_page(target.url, target.project, None)
        lookup = lookup_of(api.get_run(name, run_id).request)
        assert lookup is not None
        found = [
            seen
            for seen in page.parse(client._transport(page.request))
            if lookup in (seen.by_id, seen.by_name)
        ]
        assert all(api.get_run(name, run_id).parse(seen.reply) == seen.run for seen in found)
        return found[0].run if found else None

    for run_id in (run.id, None):
        single, shared = alone(run_id), on_page(run_id)
        assert single is not None
        assert shared is not None
        assert single.raw_status == shared.raw_status == "running"
        # The cost grows between the two requests.
        assert replace(single, cost=0) == replace(shared, cost=0)
        assert shared.jobs[0].submissions
    flag.touch()
    run.wait(target.timeout, poll_interval=target.poll_interval)
    assert on_page(run.id) is None
    assert alone(run.id) is not None


def test_a_shared_client_follows_to_the_end(target: Target) -> None:
    name = f"sl-{uuid.uuid4().hex[:12]}"

    async def go() -> tuple[list[str], dstack.Event]:
        async with dstack.SharedAsyncClient(**target.arguments()) as client:
            run = await client.runs.submit(
                target.task("for i in 1 2 3 4 5 6; do echo line-$i; sleep 1; done"), run_name=name
            )

            async def others() -> None:
                # Enough polls at once to be worth a page.
                while True:
                    await asyncio.gather(*[client.runs.get(f"{name}-{i}") for i in range(5)])

            asking = asyncio.create_task(others())
            lines: list[str] = []
            async for event in run.follow(poll_interval=target.poll_interval):
                if isinstance(event, dstack.LogLines):
                    lines += event.lines
            asking.cancel()
            return lines, event

    lines, last = asyncio.run(go())
    assert lines == [f"line-{i}" for i in range(1, 7)]
    assert isinstance(last, dstack.RunFinished)
    assert str(last.outcome.status) == "done"
