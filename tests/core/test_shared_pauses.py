"""The moments at which followed runs are polled, and how often a silent log is read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from dstack_core._flow.follow import LONGEST_LOG_PAUSE, FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._flow.steps import Flow, Sleep, Wait, call
from dstack_core._shared import batched_polls
from dstack_core._shared.pending_polls import polls_until_turn, seconds_to_poll
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply
from dstack_core._wire.runs import RunSnapshot
from dstack_core.models.events import LogLines, RunFinished
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from tests.core.scripted import Clock, Driver, Script, page, reply, run_json

API = Api("http://server", "main")


def together(flow: Flow[Outcome], clock: Clock, run_id: str) -> Flow[Outcome]:
    """Carry out the waits of a flow at the moments of the shared polls."""

    def polls(wait: Wait) -> Any:
        left = polls_until_turn(wait.polls, wait.interval, run_id, clock())
        yield Sleep(seconds_to_poll(wait.interval, run_id, clock()))
        while True:
            run: RunSnapshot | None = yield from call(wait.poll)
            left -= 1
            if not left or wait.ends_with(run):
                return run
            yield Sleep(wait.interval)

    answer: Any = None
    while True:
        try:
            step = flow.send(answer)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        answer = (yield from polls(step)) if isinstance(step, Wait) else (yield step)


def shared_flow(driver: Driver, run_id: str = "id-1", poll_interval: float = 5) -> Flow[Outcome]:
    options = FollowOptions(
        poll_interval,
        logs=True,
        wall_clock=driver.clock,
        longest_log_pause=batched_polls.LONGEST_LOG_PAUSE,
    )
    return together(follow(API, Progress("train", run_id), options), driver.clock, run_id)


def test_shared_flows_poll_at_the_same_moments(driver: Driver) -> None:
    driver.clock.now = 1003.2
    script = Script(
        runs__get=[reply(run_json(status)) for status in ("running", "running", "running", "done")],
        logs__poll=[page()],
    )
    driver.events(shared_flow(driver), script)
    first, *others = driver.clock.slept
    # The moments of different runs are spread over a second, so that they are not all due at once.
    assert 1.8 <= first < 2.8
    assert others == pytest.approx([5, 5])


def test_different_runs_are_polled_at_slightly_different_moments() -> None:
    pauses = [seconds_to_poll(5, f"id-{index}", 1003.2) for index in range(1000)]
    assert min(pauses) < 1.85
    assert max(pauses) > 2.75
    assert all(1.8 <= pause < 2.8 for pause in pauses)
    assert all(0.3 <= seconds_to_poll(0.5, f"id-{index}", 1003.2) < 0.4 for index in range(1000))


def test_a_timer_that_ends_a_moment_early_causes_no_second_poll() -> None:
    due = seconds_to_poll(5, "id-1", 0.0)
    for early in (0.0, 1e-12, 0.01):
        assert seconds_to_poll(5, "id-1", due - early) == pytest.approx(5, abs=0.02)


@pytest.mark.parametrize(
    ("shared", "poll_interval", "longest"),
    [
        *[(True, 0.5, 12), (True, 5, 12), (True, 15, 4), (True, 30, 2), (True, 120, 1)],
        *[(False, 0.5, 12), (False, 2, 4), (False, 5, 2), (False, 15, 1)],
    ],
)
def test_a_silent_log_is_read_less_often_until_it_has_new_lines(
    driver: Driver, shared: bool, poll_interval: float, longest: int
) -> None:
    log_reads: list[int] = []
    began = 1200 + seconds_to_poll(poll_interval, "id-1", 1200)

    def log(body: dict[str, Any]) -> Reply:
        log_reads.append(round((driver.clock.now - began) / poll_interval))
        return page((1, "spoke\n")) if log_reads[-1] >= 90 else page()

    script = Script(runs__get=[], logs__poll=[log])
    script.answers["runs/get"] = [reply(run_json(status)) for status in ["running"] * 110 + ["done"]]
    driver.clock.now = began
    if shared:
        flow = shared_flow(driver, poll_interval=poll_interval)
    else:
        options = FollowOptions(poll_interval, logs=True, wall_clock=driver.clock)
        flow = follow(API, Progress("train", "id-1"), options)
    events = driver.events(retrying(flow, RetryBudget(600, driver.clock)), script)
    silent = [read for read in log_reads if read < 90]
    assert silent[:2] == [0, 1]
    gaps = [later - earlier for earlier, later in pairwise(silent)]
    # A pause is never longer than the silence before it.
    assert all(gap <= max(1, earlier) for earlier, gap in zip(silent, gaps, strict=False))
    assert max(gaps) == longest
    assert gaps[-2:] == [longest] * 2
    assert [event.lines for event in events if isinstance(event, LogLines)] == [("spoke",)]
    spoken = next(read for read in log_reads if read >= 90)
    assert spoken < 90 + longest
    assert spoken + 1 in log_reads
    assert isinstance(events[-1], RunFinished)


def test_logs_that_fell_silent_together_are_read_in_turns(driver: Driver) -> None:
    log_reads: list[set[str]] = [set() for _ in range(61)]
    for index in range(60):
        name = f"id-{index}"
        began = 1000 + seconds_to_poll(5, name, 1000)

        def log(body: dict[str, Any], name: str = name, began: float = began) -> Reply:
            log_reads[round((driver.clock.now - began) / 5)].add(name)
            return page()

        script = Script(runs__get=[], logs__poll=[log])
        script.answers["runs/get"] = [
            reply(run_json(status, run_id=name)) for status in ["running"] * 60 + ["done"]
        ]
        driver.clock.now = began
        driver.events(shared_flow(driver, name), script)
    assert len(log_reads[0]) == 60
    late = log_reads[40:52]
    assert sum(map(len, late)) == 60
    assert max(map(len, late)) < 20


@pytest.mark.parametrize("longest", [LONGEST_LOG_PAUSE, batched_polls.LONGEST_LOG_PAUSE])
def test_a_silent_log_is_due_within_the_longest_pause(longest: float) -> None:
    for interval in (0.1, 1, 5, 7, 20, 100):
        options = FollowOptions(interval, logs=True, wall_clock=lambda: 0.0, longest_log_pause=longest)
        pauses = [options.log_pause(silent_for * interval) for silent_for in range(100)]
        assert pauses[:2] == [interval, interval]
        assert pauses == sorted(pauses)
        assert all(pause <= max(interval, longest) for pause in pauses)
