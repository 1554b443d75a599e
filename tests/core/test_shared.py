"""Many watched runs, few requests: shared status reads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from itertools import pairwise
from typing import Any, TypeVar

import pytest

import dstack_core as dstack
from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._shared import Board
from dstack_core._wire.api import Api
from dstack_core._wire.lookups import PAGE_SIZE, Lookup, lookup_of
from dstack_core._wire.plain import Reply, Request
from dstack_core.errors import TransientServerError
from dstack_core.local import LocalServer
from dstack_core.models.events import Event, LogLines, RunFinished
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, Driver, Script, page, reply, run_json

T = TypeVar("T")
API = Api("http://server", "main")


class Server:
    """Answer ``runs/list`` from a list of active runs; ``gate`` holds back its replies."""

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
        # What the reply says is decided here, when the request arrives.
        answer = self.answer or reply(runs)
        self.asked.set()
        await self.gate.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


def look(index: int) -> Lookup:
    return Lookup("main", "id", f"id-{index}")


def board(server: Server) -> Board:
    return Board(server, "http://server", "main")


def run(steps: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(steps(), 60))


async def looks(one: Board, indexes: range) -> list[Reply | None]:
    return list(await asyncio.gather(*[one.look(look(index)) for index in indexes]))


def test_requests_for_one_run_are_told_from_others() -> None:
    assert lookup_of(API.get_run("train", "id-1").request) == Lookup("main", "id", "id-1")
    assert lookup_of(Api("", "a b/c").get_run("train").request) == Lookup("a b/c", "run_name", "train")
    assert lookup_of(API.stop("train", abort=False).request) is None
    assert lookup_of(API.list_runs(only_active=True).request) is None


def test_looks_of_a_moment_share_a_request() -> None:
    async def steps() -> None:
        server = Server(50)
        replies = await looks(board(server), range(50))
        for index, found in enumerate(replies):
            assert found is not None
            parsed = API.get_run(f"run-{index}", f"id-{index}").parse(found)
            assert parsed is not None
            assert (parsed.id, parsed.name) == (f"id-{index}", f"run-{index}")
            assert parsed == API.get_run("").parse(reply(server.runs[49 - index]))
        assert len(server.bodies) == 1
        assert server.bodies[0] == {"project_name": "main", "only_active": True, "limit": 100}

    run(steps)


def test_looks_by_name_are_answered_too() -> None:
    async def steps() -> None:
        one = board(Server(9))
        names = [Lookup("main", "run_name", f"run-{index}") for index in range(9)]
        replies = await asyncio.gather(*map(one.look, names))
        assert [found.json()["id"] for found in replies if found] == [f"id-{index}" for index in range(9)]

    run(steps)


def test_more_than_a_page_is_paged_and_a_missing_run_is_asked_for_alone() -> None:
    async def steps() -> None:
        server = Server(250)
        replies = await looks(board(server), range(260))
        assert [found is None for found in replies] == [False] * 250 + [True] * 10
        assert len(server.bodies) == 3
        assert server.bodies[1]["prev_run_id"] == "id-150"

    run(steps)


def test_pages_end_where_they_are_not_worth_it() -> None:
    async def steps() -> None:
        server = Server(500)
        replies = await looks(board(server), range(6))
        assert replies == [None] * 6
        assert len(server.bodies) == 1

    run(steps)


def test_runs_on_the_last_pages_are_worth_reading_those_before() -> None:
    async def steps() -> None:
        server = Server(500)
        replies = await looks(board(server), range(100))
        assert all(replies)
        assert len(server.bodies) == 5

    run(steps)


def test_few_looks_need_no_page() -> None:
    async def steps() -> None:
        server = Server(9)
        assert await looks(board(server), range(2)) == [None, None]
        assert server.bodies == []

    run(steps)


def test_an_answer_is_never_older_than_its_question() -> None:
    async def steps() -> None:
        server = Server(10)
        one = board(server)
        server.gate.clear()
        first = asyncio.create_task(looks(one, range(5)))
        await server.asked.wait()
        # Asked while the first request is under way: its reply may not answer these.
        late = asyncio.create_task(looks(one, range(10)))
        await asyncio.sleep(0)
        server.runs = [item | {"status": "terminating"} for item in server.runs]
        server.gate.set()
        assert {found.json()["status"] for found in await first if found} == {"running"}
        assert {found.json()["status"] for found in await late if found} == {"terminating"}
        assert len(server.bodies) == 2

    run(steps)


def test_who_leaves_disturbs_nobody_and_nobody_means_no_request() -> None:
    async def steps() -> None:
        server = Server(10)
        one = board(server)
        tasks = [asyncio.create_task(one.look(look(index))) for index in range(10)]
        await asyncio.sleep(0)
        for task in tasks[:5]:
            task.cancel()
        assert all(found is not None for found in await asyncio.gather(*tasks[5:]))
        assert all(task.cancelled() for task in tasks[:5])
        gone = [asyncio.create_task(one.look(look(index))) for index in range(10)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        assert one._rounds is not None
        await one._rounds
        assert len(server.bodies) == 1

    run(steps)


def test_nothing_goes_on_once_nobody_asks() -> None:
    async def steps() -> None:
        one = board(Server(10))
        await looks(one, range(10))
        if one._rounds is not None:
            await one._rounds
        assert one._rounds is None
        assert None not in await looks(one, range(10))

    run(steps)


@pytest.mark.parametrize("answer", [LOST, reply({"detail": "busy"}, 503, retry_after="7")])
def test_a_fault_reaches_everybody_as_the_fault_it_is(answer: Any) -> None:
    async def steps() -> None:
        server = Server(10)
        server.answer = answer
        one = board(server)

        async def parsed(index: int) -> object:
            found = await one.look(look(index))
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
def test_any_other_answer_has_each_ask_alone(answer: Reply) -> None:
    async def steps() -> None:
        server = Server(10)
        server.answer = answer
        assert await looks(board(server), range(10)) == [None] * 10

    run(steps)


def test_closing_leaves_nobody_waiting() -> None:
    async def steps() -> None:
        server = Server(10)
        one = board(server)
        server.gate.clear()
        first = asyncio.create_task(looks(one, range(5)))
        await server.asked.wait()
        late = asyncio.create_task(looks(one, range(5)))
        await asyncio.sleep(0)
        one.close()
        assert await first == await late == [None] * 5

    run(steps)


def shared_flow(driver: Driver) -> Any:
    options = FollowOptions(poll_interval=5, logs=True, wall_clock=driver.clock, shared=True)
    return retrying(follow(API, Progress("train", "id-1"), options), RetryBudget(600, driver.clock))


def test_shared_flows_look_at_the_same_moments(driver: Driver) -> None:
    driver.clock.now = 1003.2
    script = Script(
        runs__get=[reply(run_json(status)) for status in ("running", "running", "running", "done")],
        logs__poll=[page()],
    )
    driver.events(shared_flow(driver), script)
    first, *others = driver.clock.slept
    # The moments of different runs are spread over a second, so that they do not all wake at once.
    assert 1.8 <= first < 2.8
    assert others == pytest.approx([5, 5])


def test_different_runs_look_at_slightly_different_moments(driver: Driver) -> None:
    options = FollowOptions(poll_interval=5, logs=True, wall_clock=lambda: 1003.2, shared=True)
    pauses = [options.pause(f"id-{index}").seconds for index in range(1000)]
    assert min(pauses) < 1.85
    assert max(pauses) > 2.75
    assert all(1.8 <= pause < 2.8 for pause in pauses)
    often = FollowOptions(poll_interval=0.5, logs=True, wall_clock=lambda: 1003.2, shared=True)
    assert all(0.3 <= often.pause(f"id-{index}").seconds < 0.4 for index in range(1000))


def test_a_timer_that_ends_a_moment_early_causes_no_second_look() -> None:
    options = FollowOptions(poll_interval=5, logs=True, wall_clock=lambda: 0.0, shared=True)
    due = options.pause("id-1").seconds
    for early in (0.0, 1e-12, 0.01):
        woken = FollowOptions(poll_interval=5, logs=True, wall_clock=lambda: due - early, shared=True)  # noqa: B023 - called at once
        assert woken.pause("id-1").seconds == pytest.approx(5, abs=0.02)


@pytest.mark.parametrize(
    ("shared", "poll_interval", "longest"),
    [
        *[(True, 0.5, 12), (True, 5, 12), (True, 15, 4), (True, 30, 2), (True, 120, 1)],
        *[(False, 0.5, 12), (False, 2, 4), (False, 5, 2), (False, 15, 1)],
    ],
)
def test_a_silent_log_is_read_less_and_less_until_it_speaks(
    driver: Driver, shared: bool, poll_interval: float, longest: int
) -> None:
    looks_at_log: list[int] = []

    def log(body: dict[str, Any]) -> Reply:
        looks_at_log.append(round((driver.clock.now - 1200) / poll_interval))
        return page((1, "spoke\n")) if looks_at_log[-1] >= 90 else page()

    script = Script(runs__get=[], logs__poll=[log])
    script.answers["runs/get"] = [reply(run_json(status)) for status in ["running"] * 110 + ["done"]]
    driver.clock.now = 1200 + min(1.0, 0.2 * poll_interval)
    options = FollowOptions(poll_interval, logs=True, wall_clock=driver.clock, shared=shared)
    flow = follow(API, Progress("train", "id-1"), options)
    events = driver.events(retrying(flow, RetryBudget(600, driver.clock)), script)
    silent = [look for look in looks_at_log if look < 90]
    assert silent[:2] == [0, 1]
    gaps = [later - earlier for earlier, later in pairwise(silent)]
    # A pause is never longer than the silence before it.
    assert all(gap <= max(1, earlier) for earlier, gap in zip(silent, gaps, strict=False))
    assert max(gaps) == longest
    assert gaps[-2:] == [longest] * 2
    assert [event.lines for event in events if isinstance(event, LogLines)] == [("spoke",)]
    spoken = next(look for look in looks_at_log if look >= 90)
    assert spoken < 90 + longest
    assert spoken + 1 in looks_at_log
    assert isinstance(events[-1], RunFinished)


def test_logs_that_fell_silent_together_take_turns(driver: Driver) -> None:
    looks_at_log: list[set[str]] = [set() for _ in range(61)]
    for index in range(60):
        name = f"id-{index}"

        def log(body: dict[str, Any], name: str = name) -> Reply:
            looks_at_log[round((driver.clock.now - 1000) / 5)].add(name)
            return page()

        script = Script(runs__get=[], logs__poll=[log])
        script.answers["runs/get"] = [
            reply(run_json(status, run_id=name)) for status in ["running"] * 60 + ["done"]
        ]
        driver.clock.now = 1001
        options = FollowOptions(5, logs=True, wall_clock=driver.clock, shared=True)
        driver.events(follow(API, Progress("train", name), options), script)
    assert len(looks_at_log[0]) == 60
    late = looks_at_log[40:52]
    assert sum(map(len, late)) == 60
    assert max(map(len, late)) < 20


# Over real sockets, against the embedded server.


def clients(server: LocalServer, number: int) -> list[dstack.SharedAsyncClient]:
    return [
        dstack.SharedAsyncClient(server_url=server.url, project_name=server.project, user_token=server.token)
        for _ in range(number)
    ]


def requests_to(server: LocalServer, ending: str) -> int:
    return sum(request.path.endswith(ending) for request in server.requests)


def wait_for_requests(server: LocalServer, ending: str, number: int) -> None:
    deadline = time.monotonic() + 30
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
    assert lists <= 2 * rounds, "a look at 120 active runs is two pages"
    assert gets < number / 10


def test_lines_precede_the_end_and_come_once() -> None:
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


def test_clients_share_only_within_a_loop_a_server_and_a_token() -> None:
    from dstack_core import _shared

    with LocalServer() as server:
        first, second = clients(server, 2)
        other = dstack.SharedAsyncClient(server_url=server.url, project_name="main", user_token="another")

        def hub(client: dstack.SharedAsyncClient) -> object:
            transport = client._transport
            assert isinstance(transport, _shared.SharedTransport)
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
        assert not _shared._hubs()._known
        first, second = clients(server, 2)
        other = dstack.SharedAsyncClient(server_url=server.url, project_name="main", user_token="another")
        assert asyncio.run(go()) is not one


def test_a_loop_that_ended_is_not_kept() -> None:
    from dstack_core import _shared

    with LocalServer() as server:
        for _ in range(3):
            (forgotten,) = clients(server, 1)
            asyncio.run(forgotten.runs.get("nobody"))
        assert len(_shared._hubs()._known) == 1
