"""Clients of one process that watch many runs of an embedded server."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable
from typing import TypeVar

import pytest

import dstack_core as dstack
from dstack_core._flow.steps import Wait
from dstack_core._shared.batched_polls import BatchedPolls
from dstack_core._shared.pending_polls import PendingPoll
from dstack_core._wire.lookups import Lookup
from dstack_core.local import LocalServer
from dstack_core.models.events import Event, LogLines, RunFinished

T = TypeVar("T")


def clients(server: LocalServer, number: int) -> list[dstack.SharedAsyncClient]:
    return [
        dstack.SharedAsyncClient(server_url=server.url, project_name=server.project, user_token=server.token)
        for _ in range(number)
    ]


def requests_to(server: LocalServer, ending: str) -> int:
    return sum(request.path.endswith(ending) for request in server.requests)


def wait_for_requests(server: LocalServer, ending: str, number: int) -> None:
    deadline = time.monotonic() + 120
    while requests_to(server, ending) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def closing(all_clients: list[dstack.SharedAsyncClient], steps: Awaitable[T]) -> T:
    try:
        return await steps
    finally:
        for client in all_clients:
            await client.close()


def test_many_followed_runs_need_few_requests() -> None:
    number, interval = 120, 0.5
    waiting = {"type": "task", "commands": ["true"], "resources": {"gpu": 99}}
    with LocalServer() as server:

        async def go() -> tuple[int, int, float]:
            async with dstack.AsyncClient(
                server_url=server.url, project_name=server.project, user_token=server.token
            ) as submitter:
                runs = await asyncio.gather(
                    *[
                        submitter.runs.submit(
                            waiting, run_name=f"w-{i}", retry_policy=dstack.RetryPolicy(retry=True)
                        )
                        for i in range(number)
                    ]
                )
            watchers = clients(server, number)
            pairs = zip(watchers, runs, strict=True)
            followed = await asyncio.gather(*[client.runs.get(run.name) for client, run in pairs])
            lists, gets = requests_to(server, "/runs/list"), requests_to(server, "/runs/get")
            ends: list[Event] = []

            async def follow_one(found: dstack.AsyncRun | None) -> None:
                assert found is not None
                async for event in found.follow(poll_interval=interval):
                    ends.append(event)

            tasks = [asyncio.create_task(follow_one(found)) for found in followed]
            loop = asyncio.get_running_loop()
            started = loop.time()
            await asyncio.to_thread(wait_for_requests, server, "/runs/list", lists + 12)
            seconds = loop.time() - started
            seen = requests_to(server, "/runs/list") - lists, requests_to(server, "/runs/get") - gets
            await asyncio.gather(*[found.stop() for found in followed if found])
            await asyncio.gather(*tasks)
            assert sum(isinstance(event, RunFinished) for event in ends) == number
            await closing(watchers, asyncio.sleep(0))
            return *seen, seconds

        lists, gets, seconds = asyncio.run(go())
    rounds = seconds / interval + 2
    assert lists <= 2 * rounds, "polling 120 active runs takes two pages"
    assert gets < number / 10


def test_lines_precede_the_end_and_arrive_once() -> None:
    with LocalServer() as server:

        async def one(client: dstack.SharedAsyncClient, number: int) -> list[Event]:
            run = await client.runs.submit(
                {"type": "task", "commands": [f"for i in 1 2 3 4 5; do echo {number}-$i; sleep 0.2; done"]},
                run_name=f"l-{number}",
            )
            return [event async for event in run.follow(poll_interval=0.2)]

        async def go() -> list[list[Event]]:
            all_clients = clients(server, 6)
            return await closing(
                all_clients, asyncio.gather(*[one(client, i) for i, client in enumerate(all_clients)])
            )

        for number, events in enumerate(asyncio.run(go())):
            lines = [line for event in events if isinstance(event, LogLines) for line in event.lines]
            assert lines == [f"{number}-{i}" for i in range(1, 6)]
            assert isinstance(events[-1], RunFinished)


def test_clients_share_polls_only_within_a_loop_a_server_and_a_token() -> None:
    from dstack_core._shared import transport as shared

    with LocalServer() as server:
        first, second = clients(server, 2)
        other = dstack.SharedAsyncClient(server_url=server.url, project_name="main", user_token="another")

        def hub(client: dstack.SharedAsyncClient) -> object:
            transport = client._transport
            assert isinstance(transport, shared.SharedTransport)
            return transport._hub

        async def go() -> object:
            await first.runs.get("nobody")
            await second.runs.get("nobody")
            with pytest.raises(dstack.AuthenticationError):
                await other.runs.get("nobody")
            assert hub(first) is hub(second) is not hub(other)
            shared = hub(first)
            await first.close()
            assert await second.runs.get("nobody") is None
            await second.close()
            await other.close()
            return shared

        one = asyncio.run(go())
        assert not shared._hubs()._known
        first, second = clients(server, 2)
        other = dstack.SharedAsyncClient(server_url=server.url, project_name="main", user_token="another")
        assert asyncio.run(go()) is not one


# Its clients stay open, and so do their connections.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_loop_that_ended_is_not_kept() -> None:
    from dstack_core._shared import transport as shared

    with LocalServer() as server:
        for _ in range(3):
            (forgotten,) = clients(server, 1)
            asyncio.run(forgotten.runs.get("nobody"))
        assert len(shared._hubs()._known) == 1
    del forgotten
    with shared._hubs()._lock:
        shared._hubs()._known.clear()
    gc.collect()


def test_waiting_for_the_end_shares_polls_unless_the_caller_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    wait = BatchedPolls.wait

    def noted(self: BatchedPolls, lookup: Lookup, step: Wait) -> PendingPoll:
        waited.append(lookup.value)
        return wait(self, lookup, step)

    monkeypatch.setattr(BatchedPolls, "wait", noted)
    task = {"type": "task", "commands": ["sleep 0.5"]}
    with LocalServer() as server:

        async def go() -> None:
            async with clients(server, 1)[0] as client:
                run = await client.runs.submit(task, run_name="together")
                assert (await run.wait(poll_interval=0.2)).status == dstack.RunStatus.DONE
                assert set(waited) == {run.id}
                waited.clear()
                alone = await client.runs.submit(task, run_name="alone")
                outcome = await alone.wait(poll_interval=0.2, sleep=asyncio.sleep)
                assert outcome.status == dstack.RunStatus.DONE
                assert not waited

        asyncio.run(go())
