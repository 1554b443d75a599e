"""Many runs through one process: no file descriptor, thread, process or temporary file is left."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.leftovers import Held, assert_nothing_is_left

COUNTS = pytest.mark.parametrize(
    "count", [50, pytest.param(1000, marks=[pytest.mark.endurance, pytest.mark.timeout(1200)])]
)
LINES = 20


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Serve from this process, with a private folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with LocalServer(step_seconds=0.0) as server:
        with server.client() as client:
            life(client, 0)
        yield server


def task(number: int) -> dict[str, Any]:
    return {"type": "task", "commands": [f"seq -f 'run {number} line %g' 1 {LINES}"]}


def is_whole(number: int, events: list[dstack.Event]) -> None:
    delivered = [line for event in events if isinstance(event, dstack.LogLines) for line in event.lines]
    assert delivered == [f"run {number} line {line}" for line in range(1, LINES + 1)]


def life(client: dstack.Client, number: int) -> None:
    is_whole(number, list(client.runs.submit(task(number)).follow(poll_interval=0.05)))


async def alife(client: dstack.AsyncClient, number: int) -> None:
    run = await client.runs.submit(task(number))
    is_whole(number, [event async for event in run.follow(poll_interval=0.05)])


@COUNTS
def test_many_runs_with_one_client_leave_nothing(alone: LocalServer, count: int) -> None:
    with alone.client() as client:
        life(client, 0)
        before = Held.now()
        for number in range(count):
            life(client, number)
        assert_nothing_is_left(before)


@COUNTS
def test_many_clients_that_are_closed_leave_nothing(alone: LocalServer, count: int) -> None:
    before = Held.now()
    for number in range(count):
        with alone.client() as client:
            life(client, number)
    assert_nothing_is_left(before)


@COUNTS
@pytest.mark.parametrize("kind", [dstack.AsyncClient, dstack.SharedAsyncClient])
def test_many_runs_with_one_async_client_leave_nothing(
    alone: LocalServer, kind: type[dstack.AsyncClient], count: int
) -> None:
    before = Held.now()

    async def go() -> None:
        async with kind(server_url=alone.url, project_name=alone.project, user_token=alone.token) as client:
            for first in range(0, count, 10):
                await asyncio.gather(*(alife(client, number) for number in range(first, first + 10)))

    asyncio.run(go())
    assert_nothing_is_left(before)
