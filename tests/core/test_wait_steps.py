"""A follower's wait as a step of its flow: news, faults, time limits, and drivers that share no polls."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core._flow.accepted_stops import Stops
from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, TimeLimit, retrying, within
from dstack_core._flow.steps import Flow, Sleep, Wait
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import TransientServerError, WaitTimeoutError
from dstack_core.models.events import ContactLost, ContactRestored, LogLines, RunFinished
from dstack_core.models.progress import Progress
from tests.core.scripted import Clock, Driver, Script, page, reply, run_json
from tests.core.test_shared import API
from tests.core.test_shared_waits import IsNews


def test_a_follower_decides_what_is_news_and_when_its_log_is_due(driver: Driver) -> None:
    """Read the log at the same polls, whether a wait is carried out as a whole or poll by poll."""
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


def test_after_an_accepted_stop_every_poll_is_news() -> None:
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


def silent_wait(interval: float = 5.0, due: float = 60.0) -> Wait:
    return Wait(API.get_run("train", "id-1"), IsNews("running"), interval, due)


def one_wait(step: Wait) -> Flow[RunSnapshot | None]:
    answer: RunSnapshot | None = yield step
    return answer


def poll_of(step: Any) -> RunSnapshot | None:
    found: RunSnapshot | None = step.parse(reply(run_json("running")))
    return found


def test_only_a_log_that_flows_is_read_less_often_in_a_crowd() -> None:
    options = {each: FollowOptions(each, logs=True, wall_clock=Clock()) for each in (1.0, 5.0, 8.0)}
    assert [one.crowded_log_pause(one.log_pause(0.0)) for one in options.values()] == [2.0, 10.0, None]
    assert options[5.0].crowded_log_pause(15.0) is None
    assert FollowOptions(5.0, logs=False, wall_clock=Clock()).crowded_log_pause(5.0) is None
    flowing = Wait(API.get_run("train", "id-1"), IsNews("running"), 5.0, 5.0, 10.0)
    assert (flowing.polls, flowing.in_crowd().polls, silent_wait().in_crowd().polls) == (1, 2, 12)


def test_a_time_limit_holds_in_a_crowd() -> None:
    clock = Clock()
    flowing = Wait(API.get_run("train", "id-1"), IsNews("running"), 5.0, 5.0, 10.0)
    flow = retrying(one_wait(flowing), RetryBudget(600, clock), Progress("train", "id-1"))
    assert next(flow) is flowing
    clock.now += 1
    assert isinstance(flow.throw(TransientServerError("busy")), ContactLost)
    step = flow.send(None)
    while not isinstance(step, Wait):
        step = flow.send(poll_of(step) if hasattr(step, "parse") else None)
    assert (step.due, step.due_in_crowd) == (4.0, None)


def test_a_fault_does_not_end_a_wait_without_news() -> None:
    """Keep waiting: otherwise a single bad reply would make thousands of followers read their logs."""
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
    # What remains of the same wait is due when the whole wait was.
    step: Any = flow.send(None)
    assert isinstance(step, Wait)
    assert step.due == 39
    with pytest.raises(StopIteration) as ended_flow:
        flow.send(answer)
    assert ended_flow.value.value is answer


def test_a_fault_with_every_poll_does_not_delay_the_end_of_a_wait() -> None:
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


def test_drivers_without_sharing_sleep_and_poll(driver: Driver) -> None:
    script = Script(
        runs__get=[reply(run_json(status)) for status in ("running", "running", "done")],
        logs__poll=[page((1, "a\n"))],
    )
    options = FollowOptions(5, logs=True, wall_clock=driver.clock)
    events = driver.events(follow(API, Progress("train", "id-1"), options), script)
    assert driver.clock.slept == [5, 5]
    assert [event.lines for event in events if isinstance(event, LogLines)] == [("a",)]
    assert isinstance(events[-1], RunFinished)
