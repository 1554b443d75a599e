"""Runs that rest: nobody is woken for a look that shows nothing new."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.steps import Rest
from dstack_core._flow.stop import Stops
from dstack_core._shared import stall
from dstack_core._shared.board import Asked, Board
from dstack_core._shared.stall import StallGuard
from dstack_core._shared.transport import SharedTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import TransientServerError
from dstack_core.models.events import LogLines, RunFinished
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, Driver, Script, page, reply, run_json
from tests.core.test_shared import API, Server, board, look, looks, run

INTERVAL = 0.2


def rest(one: Board, index: int, rounds: int, seen: str = "running", seconds: float = 0.0) -> Asked:
    def is_news(now: RunSnapshot) -> bool:
        return now.raw_status != seen

    step = Rest(seconds, API.get_run(f"run-{index}", f"id-{index}"), is_news, INTERVAL, rounds)
    return one.rest(look(index), step)


async def ended(all_asked: list[Asked]) -> list[str | None]:
    replies = await asyncio.gather(*[asked.answer for asked in all_asked])
    return [None if found is None else found.json()["status"] for found in replies]


def test_a_rest_without_news_takes_all_its_rounds_and_wakes_once() -> None:
    async def steps() -> None:
        server = Server(50)
        all_asked = [rest(board_, index, 3) for board_ in [board(server)] for index in range(50)]
        assert await ended(all_asked) == ["running"] * 50
        assert {asked.rounds for asked in all_asked} == {3}
        # A machine that stops in between splits a round in two; without sharing it would be 150 requests.
        assert 3 <= len(server.bodies) <= 6

    run(steps)


def test_news_end_a_rest_at_once_and_that_one_alone() -> None:
    async def steps() -> None:
        server = Server(20)
        one = board(server)
        all_asked = [rest(one, index, 1000) for index in range(20)]
        for _ in range(2):
            await server.asked.wait()
            server.asked.clear()
        changed = next(found for found in server.runs if found["id"] == "id-7")
        changed["status"] = "terminating"
        assert await ended(all_asked[7:8]) == ["terminating"]
        assert all_asked[7].rounds >= 2
        assert not any(asked.answer.done() for index, asked in enumerate(all_asked) if index != 7)
        one.close()

    run(steps)


def test_the_first_round_of_a_rest_is_not_before_its_time() -> None:
    async def steps() -> None:
        server = Server(20)
        one = board(server)
        soon = [rest(one, index, 1) for index in range(10)]
        late = [rest(one, index, 1, seconds=3600) for index in range(10, 20)]
        await ended(soon)
        assert not any(asked.answer.done() for asked in late)
        # Who asks now does not have to wait for who rests.
        assert None not in await looks(one, range(5))
        assert len(server.bodies) == 2
        one.close()
        assert await ended(late) == [None] * 10

    run(steps)


def test_two_that_watch_one_run_are_told_apart() -> None:
    async def steps() -> None:
        server = Server(9)
        one = board(server)
        others = [rest(one, index, 1000) for index in range(1, 9)]
        short, long, knowing = rest(one, 0, 1), rest(one, 0, 3), rest(one, 0, 1000, seen="pending")
        assert await ended([knowing, short, long]) == ["running"] * 3
        assert (knowing.rounds, short.rounds, long.rounds) == (1, 1, 3)
        one.close()
        assert await ended(others) == [None] * 8

    run(steps)


def test_a_run_that_is_over_is_on_no_page_and_asked_for_alone() -> None:
    async def steps() -> None:
        server = Server(10)
        one = board(server)
        all_asked = [rest(one, index, 1000) for index in range(10)]
        await server.asked.wait()
        server.runs = [found for found in server.runs if found["id"] != "id-3"]
        assert await ended(all_asked[3:4]) == [None]
        one.close()

    run(steps)


@pytest.mark.parametrize("answer", [LOST, reply({"detail": "busy"}, 503)])
def test_a_fault_ends_every_rest(answer: Any) -> None:
    async def steps() -> None:
        server = Server(10)
        server.answer = answer
        all_asked = [rest(board_, index, 1000) for board_ in [board(server)] for index in range(10)]

        async def parsed(asked: Asked) -> object:
            found = await asked.answer
            assert found is not None
            return API.get_run("train", "id-1").parse(found)

        errors = await asyncio.gather(*map(parsed, all_asked), return_exceptions=True)
        assert {type(error) for error in errors} == {TransientServerError}

    run(steps)


def test_who_is_cancelled_rests_no_more() -> None:
    async def steps() -> None:
        server = Server(10)
        one = board(server)
        for asked in [rest(one, index, 1000) for index in range(10)]:
            asked.answer.cancel()
        assert one._rounds is not None
        await one._rounds
        assert server.bodies == []

    run(steps)


def test_who_is_cancelled_among_others_is_forgotten() -> None:
    async def steps() -> None:
        server = Server(10)
        one = board(server)
        # The page ends with the first of them: when that is answered, the others rest again.
        all_asked = [rest(one, index, 1000 if index else 2) for index in range(10)]
        all_asked[3].answer.cancel()
        assert await ended(all_asked[:1]) == ["running"]
        assert set(one._waiting) == {look(index) for index in range(1, 10)} - {look(3)}
        one.close()
        assert await ended(all_asked[4:]) == [None] * 6

    run(steps)


def test_a_run_that_cannot_be_read_ends_its_rest_alone() -> None:
    async def steps() -> None:
        server = Server(10)
        server.runs[0]["jobs"] = "none of yours"
        one = board(server)
        all_asked = [rest(one, index, 1000) for index in range(10)]
        found = await all_asked[9].answer
        assert found is not None
        assert found.json()["jobs"] == "none of yours"
        assert not any(asked.answer.done() for asked in all_asked[:9])
        one.close()

    run(steps)


def test_a_follower_says_what_is_news_and_when_its_log_is_due(driver: Driver) -> None:
    """Whoever passes looks over must come to the same as who makes each of them."""
    stops = Stops(driver.clock)
    options = FollowOptions(5, logs=True, wall_clock=driver.clock, shared=True, stops=stops)
    looked: list[int] = []
    for passing in (False, True):
        clock, at = [0], []
        flow = follow(API, Progress("train", "id-1"), options)
        step: Any = flow.send(None)
        while clock[0] < 100:
            if isinstance(step, Rest):
                snapshot = step.look.parse(reply(run_json("running")))
                assert snapshot is not None
                assert not step.is_news(snapshot)
                ended_one = step.look.parse(reply(run_json("terminating")))
                assert ended_one is not None
                assert step.is_news(ended_one)
                rounds = step.rounds if passing else 1
                clock[0] += rounds
                step = flow.send((snapshot, rounds))
            elif hasattr(step, "request"):
                if step.request.path.endswith("logs/poll"):
                    at.append(clock[0])
                    step = flow.send(step.parse(page()))
                else:
                    step = flow.send(step.parse(reply(run_json("running"))))
            else:
                step = flow.send(None)
        if passing:
            assert at == looked[: len(at)]
            assert len(at) >= len(looked) - 1
        looked = at
    assert looked[-1] - looked[-2] == 12


def test_a_stop_that_was_asked_for_makes_each_look_count() -> None:
    stops = Stops(lambda: 1000.0)
    options = FollowOptions(5, logs=False, wall_clock=lambda: 1000.0, shared=True, stops=stops)
    flow = follow(API, Progress("train", "id-1"), options)
    flow.send(None)
    step: Any = flow.send(API.get_run("train").parse(reply(run_json("running"))))
    while not isinstance(step, Rest):
        step = flow.send(None)
    snapshot = step.look.parse(reply(run_json("running")))
    assert snapshot is not None
    assert not step.is_news(snapshot)
    stops.note("id-1", abort=False, at=1000.0)
    assert step.is_news(snapshot)


def test_drivers_that_share_nothing_wait_and_look(driver: Driver) -> None:
    script = Script(
        runs__get=[reply(run_json(status)) for status in ("running", "running", "done")],
        logs__poll=[page((1, "a\n"))],
    )
    options = FollowOptions(5, logs=True, wall_clock=driver.clock)
    events = driver.events(follow(API, Progress("train", "id-1"), options), script)
    assert driver.clock.slept == [5, 5]
    assert [event.lines for event in events if isinstance(event, LogLines)] == [("a",)]
    assert isinstance(events[-1], RunFinished)


def test_one_guard_serves_all_clients_and_ends_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    guards: list[str] = []
    monkeypatch.setattr(StallGuard, "start", lambda _: guards.append("started"))
    monkeypatch.setattr(StallGuard, "stop", lambda _: guards.append("stopped"))

    async def steps() -> None:
        settings = TransportSettings("http://127.0.0.1:9", "token")
        transports = [SharedTransport(settings) for _ in range(5)]
        for each in transports:
            with pytest.raises(TransientServerError):
                await each(API.stop("train", abort=False).request)
        for each in transports:
            await each.close()
            assert guards == ["started"] or each is transports[-1]
        assert guards == ["started", "stopped"]

    asyncio.run(steps())


@pytest.mark.parametrize(("late", "holds"), [(7.0, []), (60.0, [stall.STALL_SECONDS])])
def test_what_comes_right_after_a_stall_is_held_back(
    monkeypatch: pytest.MonkeyPatch, late: float, holds: list[float]
) -> None:
    now, slept = [1000.0], []

    async def asleep(seconds: float) -> None:
        slept.append(seconds)

    async def steps() -> None:
        guard = StallGuard()
        guard.start()
        await guard.hold()
        now[0] += late
        guard._beat()
        monkeypatch.setattr(asyncio, "sleep", asleep)
        await guard.hold()
        now[0] += stall.STALL_SECONDS
        await guard.hold()
        guard.stop()
        assert guard._timer is None

    monkeypatch.setattr("time.time", lambda: now[0])
    asyncio.run(steps())
    assert slept == holds
