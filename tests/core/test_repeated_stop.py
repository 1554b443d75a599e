"""Stops by a client: repeated while the run is followed or waited for, and the errors when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._flow.raw_log import ChunkOptions
from dstack_core._flow.stop_options import StopTarget
from dstack_core._operations import Operations
from dstack_core.integration import StopResult, StopState
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, MISSING, Driver, Script, page, reply, run_json
from tests.core.test_stop import DENIED, STOPPED, seen, session


def stop(driver: Driver, ours: Operations, script: Script, **more: Any) -> StopResult:
    target = StopTarget("train", "mine", "id-1")
    how = {"abort": False, "until": "accepted", "timeout": None, **more}
    result: StopResult = driver.run(ours.stop(target, **how), script)
    return result


def follow(driver: Driver, ours: Operations, script: Script) -> None:
    flow = ours.follow(Progress("train", "id-1"), poll_interval=5, logs=False, retry_budget=600)
    driver.events(flow, script)


@pytest.mark.parametrize("abort", [False, True])
def test_follow_repeats_a_dropped_stop(driver: Driver, abort: bool) -> None:
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


def test_a_dropped_stop_is_repeated_a_limited_number_of_times(driver: Driver) -> None:
    script = Script(runs__get=[*seen(*["running"] * 60), *seen("done")], runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script)
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 21


def test_reading_the_log_to_its_end_repeats_a_dropped_stop(driver: Driver) -> None:
    polls = seen("running", "running", "running", "terminating", "terminated")
    script = Script(runs__get=polls, runs__stop=[STOPPED], logs__poll=[page()])
    ours = session(driver)
    stop(driver, ours, script)
    options = ChunkOptions(follow=True)
    driver.events(ours.chunks("train", "id-1", options), script)
    assert script.paths().count("runs/stop") == 2


def test_without_a_time_limit_the_stop_is_sent_once_and_not_checked(driver: Driver) -> None:
    script = Script(runs__get=seen("running"), runs__stop=[LOST, STOPPED])
    result = stop(driver, session(driver), script)
    assert script.paths() == ["runs/get", "runs/stop", "runs/stop"]
    assert result.state is StopState.ACCEPTED


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_server_that_accepts_no_stop_is_an_error(driver: Driver, timeout: float | None) -> None:
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
def test_wait_stops_a_run_whose_first_stop_was_dropped(stopper: Stopper) -> None:
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
