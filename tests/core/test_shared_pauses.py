"""When followed runs are looked at, and how often a silent log is read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._wire.api import Api
from dstack_core._wire.plain import Reply
from dstack_core.models.events import LogLines, RunFinished
from dstack_core.models.progress import Progress
from tests.core.scripted import Driver, Script, page, reply, run_json

API = Api("http://server", "main")


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
    pauses = [options.pause(f"id-{index}") for index in range(1000)]
    assert min(pauses) < 1.85
    assert max(pauses) > 2.75
    assert all(1.8 <= pause < 2.8 for pause in pauses)
    often = FollowOptions(poll_interval=0.5, logs=True, wall_clock=lambda: 1003.2, shared=True)
    assert all(0.3 <= often.pause(f"id-{index}") < 0.4 for index in range(1000))


def test_a_timer_that_ends_a_moment_early_causes_no_second_look() -> None:
    options = FollowOptions(poll_interval=5, logs=True, wall_clock=lambda: 0.0, shared=True)
    due = options.pause("id-1")
    for early in (0.0, 1e-12, 0.01):
        woken = FollowOptions(poll_interval=5, logs=True, wall_clock=lambda: due - early, shared=True)  # noqa: B023 - called at once
        assert woken.pause("id-1") == pytest.approx(5, abs=0.02)


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
