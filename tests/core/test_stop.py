"""Stopping: which requests are sent, in which order, which are repeated, and what the result reports."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dstack_core._flow.stop_options import Check, StopOptions, StopTarget, Until
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply, Request
from dstack_core.errors import TransientServerError
from dstack_core.integration import StopResult, StopState
from tests.core.scripted import LOST, MISSING, Clock, Driver, Script, reply, run_json

STOPPED = reply(None)
TERMINATING = {"status": "terminating", "termination_reason": "stopped_by_user"}
DENIED = reply({"detail": {"msg": "Access denied", "code": None}}, 403)
OURS = StopTarget("train", "mine")


def session(driver: Driver) -> Operations:
    return Operations(Api("http://server", "main"), 30.0, clock=driver.clock, wall_clock=driver.clock)


def seen(*names: str, **changes: Any) -> list[Any]:
    runs = [run_json(name, **changes) | (TERMINATING if name == "terminating" else {}) for name in names]
    return [reply(run) for run in runs]


def stop_owned(driver: Driver, script: Script, target: StopTarget = OURS, **more: Any) -> StopResult:
    how: dict[str, Any] = {"timeout": 30.0, "check": Check.NEVER, "until": Until.STOPPING, **more}
    options = StopOptions(driver.clock, **how)
    result: StopResult = driver.run(session(driver).stop_owned(target, options), script)
    return result


class SlowServer:
    """A server that answers after ``delay`` seconds of the fake clock, unless the caller's limit is shorter."""

    def __init__(self, clock: Clock, delay: float, script: Script) -> None:
        self._clock = clock
        self._delay = delay
        self._script = script
        self.sent: list[tuple[float, str]] = []

    def __call__(self, request: Request) -> Reply:
        limit = 30.0 if request.timeout is None else min(30.0, request.timeout)
        self.sent.append((self._clock.now - 1000.0, request.path.rsplit("/", 1)[1]))
        answer = self._script.send(request)
        if limit < self._delay:
            self._clock.sleep(limit)
            raise TransientServerError(f"no answer: nothing came for {limit:g} s")
        self._clock.sleep(self._delay)
        return answer


def stop_slowly(delay: float, script: Script, **more: Any) -> tuple[StopResult, list[tuple[float, str]]]:
    from dstack_core import _drive

    clock = Clock()
    server = SlowServer(clock, delay, script)
    how: dict[str, Any] = {"timeout": 4.0, "check": Check.NEVER, "until": Until.STOPPING, **more}
    ours = Operations(Api("http://server", "main"), 30.0, clock=clock)
    flow = ours.stop_owned(OURS, StopOptions(clock, **how))
    return _drive.run(flow, server, clock.sleep), server.sent


def test_a_generated_name_is_stopped_without_a_request_before_it(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("terminating"))
    result = stop_owned(driver, script)
    assert script.paths() == ["runs/stop", "runs/get"]
    assert (result.state, result.requests, result.is_safe) == (StopState.STOPPING, 1, True)
    assert result.url == "http://server/projects/main/runs/id-1"


@pytest.mark.parametrize("delay", [0.5, 1.5, 2.5, 4.0, 10.0])
def test_a_stop_is_sent_at_once_however_slow_the_server_is(delay: float) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("terminating"))
    result, sent = stop_slowly(delay, script)
    assert sent[0] == (0.0, "stop")
    assert [path for _, path in sent].count("stop") == 1
    assert result.is_safe is (2 * delay <= 4.0)
    assert sent[-1][0] <= 4.0


@pytest.mark.parametrize("delay", [0.5, 1.5, 2.5, 4.0, 10.0])
def test_an_unanswered_check_does_not_prevent_the_stop_of_ones_own_run(delay: float) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running", "terminating"))
    _, sent = stop_slowly(delay, script, check=Check.IF_ANSWERED)
    assert sent[0] == (0.0, "get")
    assert sent[1][1] == "stop"
    assert sent[1][0] <= 1.61


def test_an_unanswered_check_prevents_the_stop_of_a_run_with_an_unknown_owner() -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running"))
    result, sent = stop_slowly(10.0, script, check=Check.ALWAYS)
    assert {path for _, path in sent} == {"get"}
    assert (result.state, result.requests) == (StopState.UNCONFIRMED, 0)
    assert result.error is not None
    assert "nothing came" in result.error


def test_a_run_on_a_server_that_answers_in_three_seconds_is_stopped_if_time_allows() -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running", "terminating"))
    result, sent = stop_slowly(3.0, script, check=Check.ALWAYS, timeout=30.0)
    assert [path for _, path in sent] == ["get", "stop", "get"]
    assert result.state is StopState.STOPPING


@pytest.mark.parametrize("check", [Check.IF_ANSWERED, Check.ALWAYS])
def test_the_run_of_another_owner_is_left_alone(driver: Driver, check: Check) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running", marker="theirs"))
    result = stop_owned(driver, script, check=check)
    assert script.paths() == ["runs/get"]
    assert (result.state, result.is_safe) == (StopState.OTHER_OWNER, True)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (MISSING, StopState.MISSING),
        (reply(run_json("done")), StopState.ENDED),
        (reply(run_json("terminated", termination_reason="stopped_by_user")), StopState.ENDED),
        (seen("terminating")[0], StopState.STOPPING),
    ],
)
@pytest.mark.parametrize("check", list(Check))
def test_a_run_that_needs_no_stop_is_not_an_error(
    driver: Driver, check: Check, answer: Reply, state: StopState
) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=[answer])
    result = stop_owned(driver, script, check=check)
    assert script.paths().count("runs/stop") == (1 if check is Check.NEVER else 0)
    assert (result.state, result.is_safe, result.error) == (state, True, None)
    assert (result.outcome is not None) is (state is StopState.ENDED)


def test_a_stopping_run_can_still_be_aborted(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("terminating"))
    stop_owned(driver, script, check=Check.ALWAYS, abort=True)
    assert script.bodies("runs/stop") == [{"runs_names": ["train"], "abort": True}]


def test_the_end_is_waited_for_on_request(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running", *["terminating"] * 20, "terminated"))
    result = stop_owned(driver, script, until=Until.ENDED, timeout=60.0)
    assert result.state is StopState.ENDED
    assert result.outcome is not None
    assert script.paths().count("runs/stop") == 1


def test_a_run_that_does_not_end_in_time_is_reported_as_stopping(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("terminating"))
    result = stop_owned(driver, script, until=Until.ENDED, timeout=20.0)
    assert (result.state, result.is_safe) == (StopState.STOPPING, True)
    assert driver.clock.now <= 1020.0


@pytest.mark.parametrize("dropped", [1, 3])
def test_a_dropped_stop_is_repeated_every_five_seconds(driver: Driver, dropped: int) -> None:
    times: list[float] = []

    def stopped(body: dict[str, Any]) -> Reply:
        times.append(driver.clock.now)
        return STOPPED

    def run(body: dict[str, Any]) -> Reply:
        answer: Reply = seen("terminating" if len(times) > dropped else "running")[0]
        return answer

    script = Script(runs__stop=[stopped], runs__get=[run])
    result = stop_owned(driver, script, timeout=45.0)
    assert (result.state, result.requests) == (StopState.STOPPING, dropped + 1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(5.0 <= gap <= 7.0 for gap in gaps)


def test_a_server_that_drops_every_stop_is_reported(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running"))
    result = stop_owned(driver, script, timeout=45.0)
    assert (result.state, result.is_safe) == (StopState.UNCONFIRMED, False)
    assert result.error is not None
    assert "still running" in result.error
    assert 8 <= result.requests <= 10
    assert driver.clock.now <= 1045.0


def test_with_a_short_time_limit_one_repeat_is_sent_early(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running"))
    result = stop_owned(driver, script, timeout=4.0)
    assert result.requests == 2
    assert result.state is StopState.UNCONFIRMED


def test_after_a_lost_reply_the_run_is_polled_before_the_stop_is_sent_again(driver: Driver) -> None:
    script = Script(runs__stop=[LOST, STOPPED], runs__get=seen("terminating"))
    result = stop_owned(driver, script)
    assert script.paths() == ["runs/stop", "runs/get"]
    assert (result.state, result.requests) == (StopState.STOPPING, 1)


def test_the_stop_reaches_a_server_that_refuses_connections_for_a_while(driver: Driver) -> None:
    script = Script(
        runs__stop=[LOST, LOST, LOST, STOPPED], runs__get=[LOST, LOST, LOST, *seen("terminating")]
    )
    result = stop_owned(driver, script)
    assert (result.state, result.requests) == (StopState.STOPPING, 4)


def test_a_server_that_never_answers_is_reported_in_time(driver: Driver) -> None:
    script = Script(runs__stop=[LOST], runs__get=[LOST])
    result = stop_owned(driver, script, timeout=4.0)
    assert (result.state, result.url) == (StopState.UNCONFIRMED, "http://server/runs")
    assert result.error is not None
    assert "Connection refused" in result.error
    assert driver.clock.now <= 1004.0


@pytest.mark.parametrize("check", [Check.NEVER, Check.IF_ANSWERED, Check.ALWAYS])
def test_a_refused_stop_is_reported_at_once(driver: Driver, check: Check) -> None:
    script = Script(runs__stop=[DENIED], runs__get=seen("running"))
    result = stop_owned(driver, script, check=check)
    assert (result.state, result.requests, result.is_safe) == (StopState.REFUSED, 1, False)
    assert result.error is not None
    assert "does not let this token's user stop runs of project 'main'" in result.error
    assert driver.clock.slept == []


def test_a_refused_check_ends_the_stop(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=[DENIED])
    assert stop_owned(driver, script, check=Check.ALWAYS).state is StopState.REFUSED
    assert script.paths() == ["runs/get"]


def test_a_run_that_appears_after_the_stop_is_stopped(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=[MISSING, MISSING, *seen("submitted", "terminating")])
    result = stop_owned(driver, script, may_appear=True, timeout=4.0)
    assert script.paths() == [
        "runs/stop", "runs/get", "runs/get", "runs/get", "runs/stop", "runs/get",
    ]  # fmt: skip
    assert result.state is StopState.STOPPING


def test_a_submission_that_may_still_arrive_is_reported(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=[MISSING])
    result = stop_owned(driver, script, may_appear=True, timeout=4.0)
    assert (result.state, result.is_safe) == (StopState.UNCONFIRMED, False)
    assert result.error == "the run did not appear within 4 s; its submission may still be under way"
    assert 1002.0 <= driver.clock.now <= 1004.0


def test_two_processes_that_stop_one_run_send_one_stop_each(driver: Driver) -> None:
    script = Script(runs__get=seen("running", "running", "terminating"), runs__stop=[STOPPED])
    stop_owned(driver, script)
    stop_owned(driver, script)
    assert script.paths().count("runs/stop") == 2


@pytest.mark.parametrize(
    ("commands", "polls"),
    [(["dstack_hold_seconds=60\n"], 1), (["dstack_hold_seconds=60; x"], 1), (["true"], 0)],
)
def test_a_stop_whose_log_cannot_be_read_has_the_outcome_of_the_server(
    driver: Driver, commands: list[str], polls: int
) -> None:
    run = run_json("terminated", termination_reason="stopped_by_user")
    run["run_spec"]["configuration"]["commands"] = commands
    script = Script(runs__stop=[STOPPED], runs__get=[reply(run)], logs__poll=[LOST])
    result = stop_owned(driver, script, until=Until.ENDED)
    assert script.paths().count("logs/poll") == polls
    assert result.outcome is not None
    assert result.outcome.status.was_stopped
