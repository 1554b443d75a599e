"""A hundred threads, or tasks, with one client: every run's lines are whole, and nothing is left."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.leftovers import Held, assert_nothing_is_left

MANY = 100
LINES = 200
# Printed in pieces, so that polls come in between.
SLOW = "for part in 1 2 3 4; do seq -f 'all %g' $((part * 250 - 249)) $((part * 250)); sleep 0.3; done"


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with pytest.MonkeyPatch.context() as patch, LocalServer(step_seconds=0.0) as server:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        with server.client() as client:
            client.runs.submit({"type": "task", "commands": ["true"]}).wait(60, poll_interval=0.05)
        yield server


def task(number: int) -> dict[str, Any]:
    return {"type": "task", "commands": [f"seq -f 'run {number} line %g' 1 {LINES}"]}


def own(number: int) -> list[str]:
    return [f"run {number} line {line}" for line in range(1, LINES + 1)]


def lines(event: dstack.Event) -> tuple[str, ...]:
    return event.lines if isinstance(event, dstack.LogLines) else ()


def delivered(run: dstack.Run) -> list[str]:
    return [line for event in run.follow(poll_interval=1.0) for line in lines(event)]


async def adelivered(run: dstack.AsyncRun) -> list[str]:
    return [line async for event in run.follow(poll_interval=1.0) for line in lines(event)]


def test_threads_that_share_a_client_each_get_their_own_run(crowded: LocalServer) -> None:
    before = Held.now()
    barrier = threading.Barrier(MANY)

    def life(number: int) -> list[str]:
        barrier.wait(60)
        return delivered(client.runs.submit(task(number)))

    with crowded.client() as client, ThreadPoolExecutor(MANY) as pool:
        found = list(pool.map(life, range(MANY)))
    assert found == [own(number) for number in range(MANY)]
    assert_nothing_is_left(before)


def test_threads_that_share_a_client_and_a_run_all_get_all_of_it(crowded: LocalServer) -> None:
    before = Held.now()
    with crowded.client() as client, ThreadPoolExecutor(MANY) as pool:
        run = client.runs.submit({"type": "task", "commands": [SLOW]})
        found = list(pool.map(lambda _: delivered(run), range(MANY)))
    assert found == [[f"all {number}" for number in range(1, 1001)]] * MANY
    assert_nothing_is_left(before)


KINDS = pytest.mark.parametrize("kind", [dstack.AsyncClient, dstack.SharedAsyncClient])


def asynchronously(
    kind: type[dstack.AsyncClient], server: LocalServer, work: Callable[[dstack.AsyncClient], Any]
) -> Any:
    async def go() -> Any:
        async with kind(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            return await work(client)

    return asyncio.run(go())


@KINDS
def test_tasks_that_share_a_client_each_get_their_own_run(
    crowded: LocalServer, kind: type[dstack.AsyncClient]
) -> None:
    before = Held.now()

    async def all_lives(client: dstack.AsyncClient) -> list[list[str]]:
        async def life(number: int) -> list[str]:
            return await adelivered(await client.runs.submit(task(number)))

        return await asyncio.gather(*map(life, range(MANY)))

    assert asynchronously(kind, crowded, all_lives) == [own(number) for number in range(MANY)]
    assert_nothing_is_left(before)


@KINDS
def test_tasks_that_share_a_client_and_a_run_all_get_all_of_it(
    crowded: LocalServer, kind: type[dstack.AsyncClient]
) -> None:
    before = Held.now()

    async def all_watch(client: dstack.AsyncClient) -> list[list[str]]:
        run = await client.runs.submit({"type": "task", "commands": [SLOW]})
        return await asyncio.gather(*(adelivered(run) for _ in range(MANY)))

    assert asynchronously(kind, crowded, all_watch) == [[f"all {number}" for number in range(1, 1001)]] * MANY
    assert_nothing_is_left(before)
