"""Shared polls: many watched runs need few requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from dstack_core._shared.batched_polls import PAGE_WORTH, BatchedPolls
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply, Request
from dstack_core._wire.lookups import PAGE_SIZE, Lookup, lookup_of
from dstack_core.errors import TransientServerError
from tests.core.scripted import LOST, reply, run_json

T = TypeVar("T")
API = Api("http://server", "main")


class Server:
    """A server that answers ``runs/list`` from a list of active runs; ``gate`` holds back its replies."""

    def __init__(self, number: int) -> None:
        self.runs = [
            run_json(
                name=f"run-{index}", run_id=f"id-{index}", submitted_at=f"2026-11-23T09:00:00.{index:06}Z"
            )
            for index in reversed(range(number))
        ]
        self.bodies: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.answer: Reply | Exception | None = None

    async def __call__(self, request: Request) -> Reply:
        assert request.path == "/api/runs/list"
        body = json.loads(request.body or b"")
        self.bodies.append(body)
        before = body.get("prev_submitted_at", "3000")
        runs = [run for run in self.runs if run["submitted_at"] < before][:PAGE_SIZE]
        # The content of the reply is fixed here, when the request arrives.
        answer = self.answer or reply(runs)
        self.asked.set()
        await self.gate.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


def lookup(index: int) -> Lookup:
    return Lookup("main", "id", f"id-{index}")


def batched(server: Server) -> BatchedPolls:
    return BatchedPolls(server, "http://server", "main")


def run(steps: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(steps(), 60))


async def poll_all(one: BatchedPolls, indexes: range) -> list[Reply | None]:
    return list(await asyncio.gather(*[one.poll(lookup(index)).answer for index in indexes]))


def test_requests_for_one_run_are_recognized() -> None:
    assert lookup_of(API.get_run("train", "id-1").request) == Lookup("main", "id", "id-1")
    assert lookup_of(Api("", "a b/c").get_run("train").request) == Lookup("a b/c", "run_name", "train")
    assert lookup_of(API.stop("train", abort=False).request) is None
    assert lookup_of(API.list_runs(only_active=True).request) is None


def test_simultaneous_polls_share_a_request() -> None:
    async def steps() -> None:
        server = Server(50)
        replies = await poll_all(batched(server), range(50))
        for index, found in enumerate(replies):
            assert found is not None
            parsed = API.get_run(f"run-{index}", f"id-{index}").parse(found)
            assert parsed is not None
            assert (parsed.id, parsed.name) == (f"id-{index}", f"run-{index}")
            assert parsed == API.get_run("").parse(reply(server.runs[49 - index]))
        assert len(server.bodies) == 1
        assert server.bodies[0] == {"project_name": "main", "only_active": True, "limit": 100}

    run(steps)


def test_polls_by_name_are_answered_too() -> None:
    async def steps() -> None:
        one = batched(Server(9))
        names = [Lookup("main", "run_name", f"run-{index}") for index in range(9)]
        replies = await asyncio.gather(*[one.poll(name).answer for name in names])
        assert [found.json()["id"] for found in replies if found] == [f"id-{index}" for index in range(9)]

    run(steps)


def test_polls_beyond_one_page_read_the_next_and_a_missing_run_is_polled_alone() -> None:
    async def steps() -> None:
        server = Server(250)
        replies = await poll_all(batched(server), range(260))
        assert [found is None for found in replies] == [False] * 250 + [True] * 10
        assert len(server.bodies) == 3
        assert server.bodies[1]["prev_run_id"] == "id-150"

    run(steps)


def test_few_polls_are_not_worth_a_second_page() -> None:
    async def steps() -> None:
        server = Server(500)
        replies = await poll_all(batched(server), range(6))
        assert replies == [None] * 6
        assert len(server.bodies) == 1

    run(steps)


def test_many_polls_are_worth_reading_every_page() -> None:
    async def steps() -> None:
        server = Server(500)
        replies = await poll_all(batched(server), range(100))
        assert all(replies)
        assert len(server.bodies) == 5

    run(steps)


def test_few_polls_need_no_page() -> None:
    async def steps() -> None:
        server = Server(9)
        assert await poll_all(batched(server), range(2)) == [None, None]
        assert server.bodies == []

    run(steps)


def test_few_watched_runs_do_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_core._shared.batched_polls.GATHER_SECONDS", 3600)

    async def steps() -> None:
        server = Server(9)
        one = batched(server)
        for _ in range(3):
            assert await poll_all(one, range(PAGE_WORTH - 1)) == [None] * (PAGE_WORTH - 1)
        waiting = one.poll(lookup(PAGE_WORTH)).answer
        assert (await asyncio.wait([waiting], timeout=0.05))[0] == set()
        one.close()
        assert await waiting is None

    run(steps)


def test_runs_that_are_no_longer_polled_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps() -> None:
        one = batched(Server(9))
        await poll_all(one, range(9))
        monkeypatch.setattr("dstack_core._shared.batched_polls.GATHER_SECONDS", 3600)
        monkeypatch.setattr("dstack_core._shared.batched_polls._REMEMBERED_SECONDS", 0.0)
        assert await one.poll(lookup(0)).answer is None

    run(steps)


def test_a_reply_is_never_older_than_its_poll() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        server.gate.clear()
        first = asyncio.create_task(poll_all(one, range(5)))
        await server.asked.wait()
        # These polls start while the first request is under way, so its reply must not answer them.
        late = asyncio.create_task(poll_all(one, range(10)))
        await asyncio.sleep(0)
        server.runs = [item | {"status": "terminating"} for item in server.runs]
        server.gate.set()
        assert {found.json()["status"] for found in await first if found} == {"running"}
        assert {found.json()["status"] for found in await late if found} == {"terminating"}
        assert len(server.bodies) == 2

    run(steps)


def test_cancelled_polls_do_not_affect_others_and_cause_no_request_when_none_is_left() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        tasks = [asyncio.ensure_future(one.poll(lookup(index)).answer) for index in range(10)]
        await asyncio.sleep(0)
        for task in tasks[:5]:
            task.cancel()
        assert all(found is not None for found in await asyncio.gather(*tasks[5:]))
        assert all(task.cancelled() for task in tasks[:5])
        gone = [asyncio.ensure_future(one.poll(lookup(index)).answer) for index in range(10)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        assert one._rounds is not None
        await one._rounds
        assert len(server.bodies) == 1

    run(steps)


def test_no_task_keeps_running_once_nothing_polls() -> None:
    async def steps() -> None:
        one = batched(Server(10))
        await poll_all(one, range(10))
        if one._rounds is not None:
            await one._rounds
        assert one._rounds is None
        assert None not in await poll_all(one, range(10))

    run(steps)


@pytest.mark.parametrize("answer", [LOST, reply({"detail": "busy"}, 503, retry_after="7")])
def test_a_fault_reaches_every_poll_unchanged(answer: Any) -> None:
    async def steps() -> None:
        server = Server(10)
        server.answer = answer
        one = batched(server)

        async def parsed(index: int) -> object:
            found = await one.poll(lookup(index)).answer
            assert found is not None
            return API.get_run(f"run-{index}", f"id-{index}").parse(found)

        errors = await asyncio.gather(*[parsed(index) for index in range(10)], return_exceptions=True)
        assert {type(error) for error in errors} == {TransientServerError}
        assert len({id(error) for error in errors}) == 10
        if isinstance(answer, Reply):
            assert {error.retry_after for error in errors if isinstance(error, TransientServerError)} == {"7"}
            assert "run run-3" in str(errors[3])

    run(steps)


@pytest.mark.parametrize(
    "answer", [reply({"detail": "No"}, 403), reply({"detail": "No"}, 405), reply({"odd": 1}), reply([])]
)
def test_after_any_other_reply_each_run_is_polled_alone(answer: Reply) -> None:
    async def steps() -> None:
        server = Server(10)
        server.answer = answer
        assert await poll_all(batched(server), range(10)) == [None] * 10

    run(steps)


def test_closing_ends_every_poll() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        server.gate.clear()
        first = asyncio.create_task(poll_all(one, range(5)))
        await server.asked.wait()
        late = asyncio.create_task(poll_all(one, range(5)))
        await asyncio.sleep(0)
        one.close()
        assert await first == await late == [None] * 5

    run(steps)
