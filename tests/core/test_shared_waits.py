"""Followers that wait for news: a poll that shows nothing new wakes none of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dstack_core._flow.accepted_stops import Stops
from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, TimeLimit, retrying, within
from dstack_core._flow.steps import Flow, Sleep, Wait
from dstack_core._shared import process_pause
from dstack_core._shared.batched_polls import BatchedPolls
from dstack_core._shared.pending_polls import PendingPoll, polls_until_turn
from dstack_core._shared.process_pause import PauseGuard
from dstack_core._shared.transport import SharedTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import TransientServerError, WaitTimeoutError
from dstack_core.models.events import ContactLost, ContactRestored, LogLines, RunFinished
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, Clock, Driver, Script, page, reply, run_json
from tests.core.test_shared import API, Server, batched, look, looks, run

INTERVAL = 0.2


class IsNews:
    """Deny news while a run has the status that was ``seen``, and count how often."""

    def __init__(self, seen: str) -> None:
        self.seen = seen
        self.denied = 0

    def __call__(self, now: RunSnapshot) -> bool:
        self.denied += now.raw_status == self.seen
        return now.raw_status != self.seen


def wait(
    one: BatchedPolls, index: int, polls: int, seen: str = "running", seconds: float = 0.0
) -> PendingPoll:
    """Wait from now on, whatever the clock says and whoever's turn it is."""
    poll = API.get_run(f"run-{index}", f"id-{index}")
    return one._wait(look(index), Wait(poll, IsNews(seen), INTERVAL, polls * INTERVAL), seconds, polls)


def polls_of(pending: PendingPoll) -> int:
    """Return how many polls a wait took, of which the last one is not asked whether it shows news."""
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
        assert await ended(all_asked) == ["running"] * 50
        assert {polls_of(asked) for asked in all_asked} == {3}
        # A machine that stops in between splits a round in two; without sharing it would be 150 requests.
        assert 3 <= len(server.bodies) <= 6

    run(steps)


def test_news_end_a_wait_at_once_and_that_one_alone() -> None:
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


def test_the_first_round_of_a_wait_is_not_before_its_time() -> None:
    async def steps() -> None:
        server = Server(20)
        one = batched(server)
        soon = [wait(one, index, 1) for index in range(10)]
        late = [wait(one, index, 1, seconds=3600) for index in range(10, 20)]
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
        one = batched(server)
        others = [wait(one, index, 1000) for index in range(1, 9)]
        short, long, knowing = wait(one, 0, 1), wait(one, 0, 3), wait(one, 0, 1000, seen="pending")
        assert await ended([knowing, short, long]) == ["running"] * 3
        assert (polls_of(knowing), polls_of(short), polls_of(long)) == (1, 1, 3)
        one.close()
        assert await ended(others) == [None] * 8

    run(steps)


def test_a_run_that_is_over_is_on_no_page_and_asked_for_alone() -> None:
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


def test_who_is_cancelled_waits_no_more() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        for asked in [wait(one, index, 1000) for index in range(10)]:
            asked.answer.cancel()
        assert one._rounds is not None
        await one._rounds
        assert server.bodies == []

    run(steps)


def test_who_is_cancelled_among_others_is_forgotten() -> None:
    async def steps() -> None:
        server = Server(10)
        one = batched(server)
        # The page ends with the first of them: when that is answered, the others rest again.
        all_asked = [wait(one, index, 1000 if index else 2) for index in range(10)]
        all_asked[3].answer.cancel()
        assert await ended(all_asked[:1]) == ["running"]
        assert set(one._pending) == {look(index) for index in range(1, 10)} - {look(3)}
        one.close()
        assert await ended(all_asked[4:]) == [None] * 6

    run(steps)


def test_a_run_that_cannot_be_read_ends_its_wait_alone() -> None:
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


def test_a_follower_says_what_is_news_and_when_its_log_is_due(driver: Driver) -> None:
    """Who carries out the polls of a wait must come to the same as who makes each of them."""
    logs_read: list[int] = []
    for at_once in (False, True):
        driver.clock.now, began, at = 1000.0, 1000.0, []
        options = FollowOptions(5, logs=True, wall_clock=driver.clock, longest_log_pause=60)
        flow = follow(API, Progress("train", "id-1"), options)
        step: Any = flow.send(None)
        while driver.clock.now < began + 500:
            if isinstance(step, Wait):
                snapshot = step.poll.parse(reply(run_json("running")))
                assert not step.ends_with(snapshot)
                assert step.ends_with(step.poll.parse(reply(run_json("terminating"))))
                assert step.ends_with(None)
                for _ in range(1 if at_once else step.polls):
                    driver.clock.now += step.due if at_once else step.interval
                step = flow.send(snapshot)
            elif hasattr(step, "request"):
                if step.request.path.endswith("logs/poll"):
                    at.append(round((driver.clock.now - began) / 5))
                    step = flow.send(step.parse(page()))
                else:
                    step = flow.send(step.parse(reply(run_json("running"))))
            else:
                step = flow.send(None)
        if at_once:
            assert at == logs_read
        logs_read = at
    assert logs_read[-1] - logs_read[-2] == 12


def test_a_stop_that_the_server_accepted_makes_each_poll_count() -> None:
    stops = Stops(lambda: 1000.0)
    options = FollowOptions(5, logs=False, wall_clock=lambda: 1000.0, stops=stops)
    flow = follow(API, Progress("train", "id-1"), options)
    flow.send(None)
    step: Any = flow.send(API.get_run("train").parse(reply(run_json("running"))))
    while not isinstance(step, Wait):
        step = flow.send(None)
    snapshot = step.poll.parse(reply(run_json("running")))
    assert snapshot is not None
    assert not step.is_news(snapshot)
    stops.note("id-1", abort=False, at=1000.0)
    assert step.is_news(snapshot)


def test_waits_end_by_turns_and_never_late() -> None:
    for polls in (1, 2, 4, 12):
        for now in (1_800_000_000.0, 1_800_000_003.7):
            turns = [polls_until_turn(polls, 5, f"id-{index}", now) for index in range(1200)]
            assert set(turns) == set(range(1, polls + 1))
            assert max(map(turns.count, set(turns))) < 2 * 1200 / polls
    for index in range(50):
        # The same turn whenever the wait begins: whoever waits again waits for all of the polls.
        first = polls_until_turn(12, 5, f"id-{index}", 1000.0)
        assert polls_until_turn(12, 5, f"id-{index}", 1000.0 + 5 * first) == 12


def silent_wait(interval: float = 5.0, due: float = 60.0) -> Wait:
    return Wait(API.get_run("train", "id-1"), IsNews("running"), interval, due)


def one_wait(step: Wait) -> Flow[RunSnapshot | None]:
    answer: RunSnapshot | None = yield step
    return answer


def poll_of(step: Any) -> RunSnapshot | None:
    found: RunSnapshot | None = step.parse(reply(run_json("running")))
    return found


def test_a_fault_does_not_end_a_wait_without_news() -> None:
    """Else a single bad reply would make thousands of followers read their logs."""
    clock = Clock()
    first = silent_wait()
    flow = retrying(one_wait(first), RetryBudget(600, clock), Progress("train", "id-1"))
    assert next(flow) is first
    clock.now += 20
    assert isinstance(flow.throw(TransientServerError("busy")), ContactLost)
    assert isinstance(flow.send(None), Sleep)
    clock.now += 1
    answer = poll_of(flow.send(None))
    assert isinstance(flow.send(answer), ContactRestored)
    # The rest of the same wait, which is due when the first one was.
    step: Any = flow.send(None)
    assert isinstance(step, Wait)
    assert step.due == 39
    with pytest.raises(StopIteration) as ended_flow:
        flow.send(answer)
    assert ended_flow.value.value is answer


def test_a_fault_with_every_poll_does_not_put_a_wait_off() -> None:
    clock = Clock()
    flow = retrying(one_wait(silent_wait()), RetryBudget(600, clock))
    step: Any = next(flow)
    while True:
        assert isinstance(step, Wait)
        clock.now += 5
        assert isinstance(flow.throw(TransientServerError("busy")), Sleep)
        step = flow.send(None)
        try:
            step = flow.send(poll_of(step))
        except StopIteration:
            break
    assert clock.now == 1060


def test_a_time_limit_bounds_a_wait_of_many_polls() -> None:
    clock = Clock()
    flow = within(one_wait(silent_wait()), TimeLimit(12, "too long", "http://page", clock, last_request=0.0))
    waits: list[tuple[float, float | None]] = []
    step: Any = next(flow)

    def to_the_end(step: Any) -> None:
        while True:
            assert isinstance(step, Wait)
            waits.append((step.due, step.poll.request.timeout))
            clock.now += step.due
            step = flow.send(poll_of(step.poll))

    with pytest.raises(WaitTimeoutError, match="too long"):
        to_the_end(step)
    assert waits == [(5, 7), (5, 2), (2, 0.1)]


def test_within_a_time_limit_a_wait_ends_when_it_is_due_or_with_news() -> None:
    for due, status in ((10.0, "running"), (60.0, "terminating")):
        clock = Clock()
        flow = within(one_wait(silent_wait(due=due)), TimeLimit(600, "too long", "", clock))
        step: Any = next(flow)
        clock.now += step.due
        step = flow.send(poll_of(step.poll))
        assert isinstance(step, Wait)
        clock.now += step.due
        found = step.poll.parse(reply(run_json(status)))
        with pytest.raises(StopIteration) as ended_flow:
            flow.send(found)
        assert ended_flow.value.value is found
        assert clock.now == 1010


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
    monkeypatch.setattr(PauseGuard, "start", lambda _: guards.append("started"))
    monkeypatch.setattr(PauseGuard, "stop", lambda _: guards.append("stopped"))

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


@pytest.mark.parametrize(("late", "holds"), [(7.0, []), (60.0, [process_pause.PAUSE_SECONDS])])
def test_what_comes_right_after_a_pause_is_held_back(
    monkeypatch: pytest.MonkeyPatch, late: float, holds: list[float]
) -> None:
    now, slept = [1000.0], []

    async def asleep(seconds: float) -> None:
        slept.append(seconds)

    async def steps() -> None:
        guard = PauseGuard()
        guard.start()
        await guard.hold()
        now[0] += late
        guard._beat()
        monkeypatch.setattr(asyncio, "sleep", asleep)
        await guard.hold()
        now[0] += process_pause.PAUSE_SECONDS
        await guard.hold()
        guard.stop()
        assert guard._timer is None

    monkeypatch.setattr("time.time", lambda: now[0])
    asyncio.run(steps())
    assert slept == holds
