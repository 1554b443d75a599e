"""Followers wait for news: a poll that shows nothing new wakes none of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dstack_core._flow.steps import Wait
from dstack_core._shared import batched_polls
from dstack_core._shared.batched_polls import PAGE_WORTH, BatchedPolls
from dstack_core._shared.pending_polls import PendingPoll, polls_until_turn
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import TransientServerError
from tests.core.scripted import LOST, reply
from tests.core.test_shared import API, Server, batched, lookup, poll_all, run

INTERVAL = 0.2


class IsNews:
    """A check that finds no news while a run has the status ``seen``, and counts its calls."""

    def __init__(self, seen: str) -> None:
        self.seen = seen
        self.denied = 0

    def __call__(self, now: RunSnapshot) -> bool:
        self.denied += now.raw_status == self.seen
        return now.raw_status != self.seen

    def when_unchanged(self, run_id: str) -> bool:
        self.denied += 1
        return False


def wait(
    one: BatchedPolls, index: int, polls: int, seen: str = "running", seconds: float = 0.0
) -> PendingPoll:
    """Start a wait of that many polls now, independent of the clock and of turns."""
    poll = API.get_run(f"run-{index}", f"id-{index}")
    return one._wait(lookup(index), Wait(poll, IsNews(seen), INTERVAL, polls * INTERVAL), seconds, polls)


def polls_of(pending: PendingPoll) -> int:
    """Return how many polls a wait took; the last one is not checked for news, so it is added."""
    assert pending.wait is not None
    assert isinstance(pending.wait.is_news, IsNews)
    return pending.wait.is_news.denied + 1


async def ended(all_asked: list[PendingPoll]) -> list[str | None]:
    replies = await asyncio.gather(*[asked.answer for asked in all_asked])
    return [None if found is None else found.json()["status"] for found in replies]


def test_a_wait_without_news_takes_all_its_polls_and_wakes_once() -> None:
    async def steps() -> None:
        server = Server(50)
        all_asked = [wait(one, index, 3) for one in [batched(server)] for index in range(50)]
        answers = await ended(all_asked)
        # A machine that pauses in between splits a round in two. The smaller part may be too few for a page:
        # those few get None and are polled alone. Without sharing there would be 150 requests.
        shared = [asked for asked, answer in zip(all_asked, answers, strict=True) if answer == "running"]
        assert {answer for answer in answers if answer != "running"} <= {None}
        assert len(shared) > 50 - PAGE_WORTH
        assert {polls_of(asked) for asked in shared} == {3}
        assert 3 <= len(server.bodies) <= 6

    run(steps)


def test_news_ends_only_the_wait_for_that_run_at_once() -> None:
    async def steps() -> None:
        server = Server(20)
        one = batched(server)
        all_asked = [wait(one, index, 1000) for index in range(20)]
        for _ in range(2):
            await server.asked.wait()
            server.asked.clear()
        changed = next(found for found in server.runs if found["id"] == "id-7")
        changed["status"] = "terminating"
        assert await ended(all_asked[7:8]) == ["terminating"]
        assert polls_of(all_asked[7]) >= 2
        assert not any(asked.answer.done() for index, asked in enumerate(all_asked) if index != 7)
        one.close()

    run(steps)


def test_the_first_poll_of_a_wait_is_not_early() -> None:
    async def steps() -> None:
        server = Server(20)
        one = batched(server)
        soon = [wait(one, index, 1) for index in range(10)]
        late = [wait(one, index, 1, seconds=3600) for index in range(10, 20)]
        await ended(soon)
        assert not any(asked.answer.done() for asked in late)
        # A poll that is due now does not wait for those that are due later.
        assert None not in await poll_all(one, range(5))
        assert len(server.bodies) == 2
        one.close()
        assert await ended(late) == [None] * 10

    run(steps)


def test_two_waits_for_one_run_end_separately() -> None:
    async def steps() -> None:
        server = Server(9)
        one = batched(server)
        others = [wait(one, index, 1000) for index in range(1, 9)]
        short, long, knowing = wait(one, 0, 1), wait(one, 0, 3), wait(one, 0, 1000, seen="pending")
        assert await ended([knowing, short, long]) == ["running"] * 3
        assert (polls_of(knowing), polls_of(short), polls_of(long)) == (1, 1, 3)
        one.close()
        assert await ended(others) == [None] * 8

    run(steps)


def test_a_run_that_has_ended_is_on_no_page_and_polled_alone() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        all_asked = [wait(one, index, 1000) for index in range(10)]
        await server.asked.wait()
        server.runs = [found for found in server.runs if found["id"] != "id-3"]
        assert await ended(all_asked[3:4]) == [None]
        one.close()

    run(steps)


@pytest.mark.parametrize("answer", [LOST, reply({"detail": "busy"}, 503)])
def test_a_fault_ends_every_wait(answer: Any) -> None:
    async def steps() -> None:
        server = Server(10)
        server.answer = answer
        all_asked = [wait(one, index, 1000) for one in [batched(server)] for index in range(10)]

        async def parsed(asked: PendingPoll) -> object:
            found = await asked.answer
            assert found is not None
            return API.get_run("train", "id-1").parse(found)

        errors = await asyncio.gather(*map(parsed, all_asked), return_exceptions=True)
        assert {type(error) for error in errors} == {TransientServerError}

    run(steps)


def test_a_cancelled_wait_ends() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        for asked in [wait(one, index, 1000) for index in range(10)]:
            asked.answer.cancel()
        assert one._rounds is not None
        await one._rounds
        assert server.bodies == []

    run(steps)


def test_a_cancelled_wait_among_others_is_forgotten() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        # The first run is the last on the page: once it is answered, the others wait again.
        all_asked = [wait(one, index, 1000 if index else 2) for index in range(10)]
        all_asked[3].answer.cancel()
        assert await ended(all_asked[:1]) == ["running"]
        assert lookup(3) not in one._pending
        # On a busy machine the next round may already have some of the others; closing answers these too.
        one.close()
        assert await ended([*all_asked[1:3], *all_asked[4:]]) == [None] * 8

    run(steps)


def test_an_unreadable_run_ends_only_its_own_wait() -> None:
    async def steps() -> None:
        server = Server(10)
        server.runs[0]["jobs"] = "none of yours"
        one = batched(server)
        all_asked = [wait(one, index, 1000) for index in range(10)]
        found = await all_asked[9].answer
        assert found is not None
        assert found.json()["jobs"] == "none of yours"
        assert not any(asked.answer.done() for asked in all_asked[:9])
        one.close()

    run(steps)


def test_in_a_crowd_a_log_that_flows_is_read_at_every_second_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_polls, "CROWD", 10)

    async def steps() -> None:
        one = batched(Server(50))
        polls = [API.get_run(f"run-{index}", f"id-{index}") for index in range(50)]
        waits = [Wait(poll, IsNews("running"), INTERVAL, INTERVAL, 2 * INTERVAL) for poll in polls]
        pending = [one.wait(lookup(index), each) for index, each in enumerate(waits)]
        # A few are read at each poll. Of a crowd, each poll ends a share of the waits.
        assert {each.left for each in pending[:10]} == {1}
        assert {each.left for each in pending[10:]} == {1, 2}
        one.close()

    run(steps)


def test_a_crowd_that_wakes_together_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_polls, "CROWD", 40)

    async def steps() -> None:
        one = batched(Server(50))
        await ended([wait(one, index, 1) for index in range(50)])
        polls = [API.get_run(f"run-{index}", f"id-{index}") for index in range(20)]
        waits = [Wait(poll, IsNews("running"), INTERVAL, INTERVAL, 2 * INTERVAL) for poll in polls]
        pending = [one.wait(lookup(index), each) for index, each in enumerate(waits)]
        assert {each.left for each in pending} == {1, 2}
        one.close()

    run(steps)


def test_waits_end_in_turns_and_never_late() -> None:
    for polls in (1, 2, 4, 12):
        for now in (1_800_000_000.0, 1_800_000_003.7):
            turns = [polls_until_turn(polls, 5, f"id-{index}", now) for index in range(1200)]
            assert set(turns) == set(range(1, polls + 1))
            assert max(map(turns.count, set(turns))) < 2 * 1200 / polls
    for index in range(50):
        # The turn does not depend on when the wait begins: a wait that starts at its turn takes all of its polls.
        first = polls_until_turn(12, 5, f"id-{index}", 1000.0)
        assert polls_until_turn(12, 5, f"id-{index}", 1000.0 + 5 * first) == 12
