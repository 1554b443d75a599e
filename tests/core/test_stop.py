"""Stopping: what is sent in which order, what is repeated, and what is known in the end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._flow.raw_log import ChunkOptions
from dstack_core._flow.stop_options import Check, StopOptions, StopTarget, Until
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply, Request
from dstack_core.errors import TransientServerError
from dstack_core.integration import StopResult, StopState
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, MISSING, Clock, Driver, Script, page, reply, run_json

STOPPED = reply(None)
TERMINATING = {"status": "terminating", "termination_reason": "stopped_by_user"}
DENIED = reply({"detail": {"msg": "Access denied", "code": None}}, 403)
OURS = StopTarget("train", "mine")


def session(driver: Driver) -> Operations:
    return Operations(Api("http://server", "main"), 30.0, clock=driver.clock, wall_clock=driver.clock)


def seen(*names: str, **changes: Any) -> list[Any]:
    runs = [run_json(name, **changes) | (TERMINATING if name == "terminating" else {}) for name in names]
    return [reply(run) for run in runs]


def stop(driver: Driver, ours: Operations, script: Script, **more: Any) -> StopResult:
    target = StopTarget("train", "mine", "id-1")
    how = {"abort": False, "until": "accepted", "timeout": None, **more}
    result: StopResult = driver.run(ours.stop(target, **how), script)
    return result


def stop_owned(driver: Driver, script: Script, target: StopTarget = OURS, **more: Any) -> StopResult:
    how: dict[str, Any] = {"timeout": 30.0, "check": Check.NEVER, "until": Until.STOPPING, **more}
    options = StopOptions(driver.clock, **how)
    result: StopResult = driver.run(session(driver).stop_owned(target, options), script)
    return result


def follow(driver: Driver, ours: Operations, script: Script) -> None:
    flow = ours.follow(Progress("train", "id-1"), poll_interval=5, logs=False, retry_budget=600)
    driver.events(flow, script)


class SlowServer:
    """Answer after ``delay`` seconds of the fake clock, or not at all when the caller has less time."""

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
def test_a_stop_leaves_at_once_however_slow_the_server_is(delay: float) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("terminating"))
    result, sent = stop_slowly(delay, script)
    assert sent[0] == (0.0, "stop")
    assert [path for _, path in sent].count("stop") == 1
    assert result.is_safe is (2 * delay <= 4.0)
    assert sent[-1][0] <= 4.0


@pytest.mark.parametrize("delay", [0.5, 1.5, 2.5, 4.0, 10.0])
def test_an_unanswered_check_does_not_prevent_the_stop_of_a_run_of_ones_own(delay: float) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running", "terminating"))
    _, sent = stop_slowly(delay, script, check=Check.IF_ANSWERED)
    assert sent[0] == (0.0, "get")
    assert sent[1][1] == "stop"
    assert sent[1][0] <= 1.61


def test_an_unanswered_check_prevents_the_stop_of_a_run_that_may_be_anybodys() -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running"))
    result, sent = stop_slowly(10.0, script, check=Check.ALWAYS)
    assert {path for _, path in sent} == {"get"}
    assert (result.state, result.requests) == (StopState.UNCONFIRMED, 0)
    assert result.error is not None
    assert "nothing came" in result.error


def test_a_server_that_answers_in_three_seconds_is_stopped_where_there_is_time() -> None:
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
def test_a_run_that_needs_no_stop_is_no_error(
    driver: Driver, check: Check, answer: Reply, state: StopState
) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=[answer])
    result = stop_owned(driver, script, check=check)
    assert script.paths().count("runs/stop") == (1 if check is Check.NEVER else 0)
    assert (result.state, result.is_safe, result.error) == (state, True, None)
    assert (result.outcome is not None) is (state is StopState.ENDED)


def test_a_run_that_is_stopping_is_aborted_all_the_more(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("terminating"))
    stop_owned(driver, script, check=Check.ALWAYS, abort=True)
    assert script.bodies("runs/stop") == [{"runs_names": ["train"], "abort": True}]


def test_the_end_is_waited_for_where_it_is_wanted(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running", *["terminating"] * 20, "terminated"))
    result = stop_owned(driver, script, until=Until.ENDED, timeout=60.0)
    assert result.state is StopState.ENDED
    assert result.outcome is not None
    assert script.paths().count("runs/stop") == 1


def test_an_end_that_takes_longer_than_there_is_time_is_a_stopping_run(driver: Driver) -> None:
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


def test_where_the_whole_time_is_short_one_repeat_comes_early(driver: Driver) -> None:
    script = Script(runs__stop=[STOPPED], runs__get=seen("running"))
    result = stop_owned(driver, script, timeout=4.0)
    assert result.requests == 2
    assert result.state is StopState.UNCONFIRMED


def test_a_lost_reply_is_answered_by_a_poll_before_the_stop_is_sent_again(driver: Driver) -> None:
    script = Script(runs__stop=[LOST, STOPPED], runs__get=seen("terminating"))
    result = stop_owned(driver, script)
    assert script.paths() == ["runs/stop", "runs/get"]
    assert (result.state, result.requests) == (StopState.STOPPING, 1)


def test_a_server_that_refuses_connections_for_a_while_gets_the_stop(driver: Driver) -> None:
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


@pytest.mark.parametrize("abort", [False, True])
def test_who_follows_repeats_a_dropped_stop(driver: Driver, abort: bool) -> None:
    polls = seen("running", "terminating", "running", "running", "terminating", "terminated")
    script = Script(runs__get=polls, runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script, abort=abort)
    follow(driver, ours, script)
    assert script.paths() == [
        "runs/get", "runs/stop",
        "runs/get", "runs/get", "runs/stop", "runs/get", "runs/stop", "runs/get", "runs/get",
    ]  # fmt: skip
    assert script.bodies("runs/stop") == [{"runs_names": ["train"], "abort": abort}] * 3


def test_a_stop_that_holds_is_sent_once(driver: Driver) -> None:
    script = Script(runs__get=seen("running", "terminating", "terminated"), runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script)
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 1


def test_a_dropped_stop_is_not_repeated_within_five_seconds(driver: Driver) -> None:
    script = Script(runs__get=seen(*["running"] * 11, "terminated"), runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script)
    flow = ours.follow(Progress("train", "id-1"), poll_interval=1, logs=False, retry_budget=600)
    driver.events(flow, script)
    assert script.paths().count("runs/stop") == 2


def test_a_run_that_this_client_did_not_stop_is_left_alone(driver: Driver) -> None:
    script = Script(runs__get=seen("running", "terminating", "running", "done"), runs__stop=[STOPPED])
    ours = session(driver)
    other = session(driver)
    stop(driver, other, Script(runs__get=seen("running"), runs__stop=[STOPPED]))
    follow(driver, ours, script)
    assert "runs/stop" not in script.paths()


def test_another_run_of_the_name_is_left_alone(driver: Driver) -> None:
    script = Script(runs__get=seen("running"), runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script)
    script.answers["runs/get"] = [reply(run_json("running", run_id="id-2")), reply(run_json("done"))]
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 1


def test_a_stop_that_failed_is_not_repeated(driver: Driver) -> None:
    refused = reply({"detail": [{"msg": "no", "code": "error"}]}, 400)
    script = Script(runs__get=seen("running", "running", "done"), runs__stop=[refused])
    ours = session(driver)
    with pytest.raises(dstack.RequestRejectedError):
        stop(driver, ours, script)
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 1


def test_repeating_has_an_end(driver: Driver) -> None:
    script = Script(runs__get=[*seen(*["running"] * 60), *seen("done")], runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script)
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 21


def test_who_reads_the_log_to_its_end_repeats_a_dropped_stop(driver: Driver) -> None:
    polls = seen("running", "running", "running", "terminating", "terminated")
    script = Script(runs__get=polls, runs__stop=[STOPPED], logs__poll=[page()])
    ours = session(driver)
    stop(driver, ours, script)
    options = ChunkOptions(follow=True)
    driver.events(ours.chunks("train", "id-1", options), script)
    assert script.paths().count("runs/stop") == 2


def test_without_a_time_limit_the_stop_is_sent_once_and_not_watched(driver: Driver) -> None:
    script = Script(runs__get=seen("running"), runs__stop=[LOST, STOPPED])
    result = stop(driver, session(driver), script)
    assert script.paths() == ["runs/get", "runs/stop", "runs/stop"]
    assert result.state is StopState.ACCEPTED


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_server_that_takes_no_stop_is_an_error(driver: Driver, timeout: float | None) -> None:
    script = Script(runs__get=seen("running"), runs__stop=[LOST])
    with pytest.raises(dstack.ServerUnreachableError, match="Connection refused"):
        stop(driver, session(driver), script, timeout=timeout)


def test_a_stop_by_name_comes_first(driver: Driver) -> None:
    script = Script(runs__get=[MISSING], runs__stop=[STOPPED])
    ours = session(driver)
    result = driver.run(ours.stop_by_name("train", False, "accepted", None), script)
    assert script.paths() == ["runs/stop", "runs/get"]
    assert result.state is StopState.MISSING
    with pytest.raises(dstack.ConfigurationError, match="run_name"):
        ours.stop_by_name("Not A Name", False, "accepted", None)


def test_two_processes_that_stop_one_run_send_one_stop_each(driver: Driver) -> None:
    script = Script(runs__get=seen("running", "running", "terminating"), runs__stop=[STOPPED])
    stop_owned(driver, script)
    stop_owned(driver, script)
    assert script.paths().count("runs/stop") == 2


SLEEPER = {"type": "task", "commands": ["trap 'exit 3' INT", "while :; do sleep 0.05; done"]}
Stopper = Callable[[dstack.Client, dstack.Run], object]


@pytest.mark.parametrize(
    "stopper",
    [
        lambda client, run: run.stop(),
        lambda client, run: client.runs.stop(run.name),
    ],
    ids=["run", "name"],
)
def test_wait_gets_a_run_stopped_whose_first_stop_was_dropped(stopper: Stopper) -> None:
    from dstack_core.local import LocalServer

    with LocalServer() as server, server.client() as client:
        run = client.runs.submit(SLEEPER)
        server.faults.forget_stops()
        stopper(client, run)
        assert run.wait(60, poll_interval=0.05).status is dstack.RunStatus.TERMINATED
        assert run.last_status is dstack.RunStatus.TERMINATED
        assert server.faults.pending == 0


def test_the_async_twin_stops_a_run_on_a_slow_and_forgetful_server() -> None:
    from dstack_core.local import LocalServer

    async def check(server: LocalServer) -> None:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            run = await client.runs.submit(SLEEPER)
            server.faults.slow(0.1, 0.4)
            server.faults.forget_stops()
            result = await run.stop(until="ended", timeout=60)
            assert result.outcome is not None
            assert (result.state, result.requests) == (StopState.ENDED, 2)

    with LocalServer() as server:
        asyncio.run(check(server))


def test_a_stop_that_shows_no_effect_in_time_is_an_error_that_names_the_run_and_its_page(
    driver: Driver,
) -> None:
    script = Script(runs__get=seen("running"), runs__stop=[STOPPED])
    with pytest.raises(dstack.WaitTimeoutError) as caught:
        stop(driver, session(driver), script, until="stopping", timeout=12.0)
    assert caught.value.message == (
        "Run train is not stopping within 12 s: the server accepted the stop (3 requests), but the run is still "
        "running. It may still be running: http://server/projects/main/runs/id-1"
    )


def test_a_run_that_is_stopping_and_does_not_end_in_time_is_an_error(driver: Driver) -> None:
    script = Script(runs__get=seen("running", "terminating"), runs__stop=[STOPPED])
    with pytest.raises(
        dstack.WaitTimeoutError, match=r"Run train is stopping, but has not ended within 12 s: http"
    ):
        stop(driver, session(driver), script, until="ended", timeout=12.0)


@pytest.mark.parametrize("error", [LOST, DENIED])
def test_a_stop_that_failed_names_the_run_and_its_page(driver: Driver, error: Any) -> None:
    script = Script(runs__get=seen("running"), runs__stop=[error])
    with pytest.raises(dstack.ServerError) as caught:
        stop(driver, session(driver), script, timeout=12.0)
    assert caught.value.message.startswith("Could not stop run train: ")
    assert caught.value.message.endswith("It may still be running: http://server/projects/main/runs/id-1")
    assert type(caught.value) in (dstack.ServerUnreachableError, dstack.AccessDeniedError)
