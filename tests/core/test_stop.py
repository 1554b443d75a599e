"""Stopping: a stop that the server forgot is asked for again, by whoever waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._flow.chunks import ChunkOptions
from dstack_core._session import Session
from dstack_core._wire.api import Api
from dstack_core.local import LocalServer
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, MISSING, Driver, Script, page, reply, run_json

STOPPED = reply(None)
TERMINATING = {"status": "terminating", "termination_reason": "stopped_by_user"}


def session(driver: Driver) -> Session:
    return Session(Api("http://server", "main"), 30.0, clock=driver.clock, wall_clock=driver.clock)


def seen(*names: str) -> list[Any]:
    runs = [run_json(name) | (TERMINATING if name == "terminating" else {}) for name in names]
    return [reply(run) for run in runs]


def stop(driver: Driver, ours: Session, script: Script, **more: Any) -> None:
    driver.run(ours.stop("train", "id-1", **{"abort": False, **more}), script)


def follow(driver: Driver, ours: Session, script: Script) -> None:
    flow = ours.follow(Progress("train", "id-1"), poll_interval=5, logs=False, retry_budget=600)
    driver.events(flow, script)


@pytest.mark.parametrize("abort", [False, True])
def test_who_follows_asks_again_each_time_the_run_is_seen_going_on(driver: Driver, abort: bool) -> None:
    looks = seen("running", "terminating", "running", "running", "terminating", "terminated")
    script = Script(runs__get=looks, runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script, abort=abort)
    follow(driver, ours, script)
    assert script.paths() == [
        "runs/get", "runs/stop", "runs/get",
        "runs/get", "runs/stop", "runs/get", "runs/stop", "runs/get", "runs/get",
    ]  # fmt: skip
    assert script.bodies("runs/stop") == [{"runs_names": ["train"], "abort": abort}] * 3


def test_a_stop_that_holds_is_asked_for_once(driver: Driver) -> None:
    script = Script(runs__get=seen("running", "terminating", "terminated"), runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script)
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 1


def test_nobody_is_stopped_whom_this_client_did_not_stop(driver: Driver) -> None:
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


def test_a_stop_that_failed_is_not_insisted_on(driver: Driver) -> None:
    refused = reply({"detail": [{"msg": "no", "code": "error"}]}, 400)
    script = Script(runs__get=seen("running", "running", "done"), runs__stop=[refused])
    ours = session(driver)
    with pytest.raises(dstack.RequestRejectedError):
        stop(driver, ours, script)
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 1


def test_asking_again_has_an_end(driver: Driver) -> None:
    script = Script(runs__get=[*seen(*["running"] * 60), *seen("done")], runs__stop=[STOPPED])
    ours = session(driver)
    stop(driver, ours, script)
    follow(driver, ours, script)
    assert script.paths().count("runs/stop") == 21


def test_who_reads_the_log_to_its_end_asks_again(driver: Driver) -> None:
    looks = seen("running", "running", "terminating", "terminated")
    script = Script(runs__get=looks, runs__stop=[STOPPED], logs__poll=[page()])
    ours = session(driver)
    stop(driver, ours, script)
    options = ChunkOptions(follow=True)
    driver.events(ours.chunks("train", "id-1", options), script)
    assert script.paths().count("runs/stop") == 2


def test_who_waits_for_nothing_can_insist_for_a_time(driver: Driver) -> None:
    looks = seen("running", "running", "terminating", "terminated")
    script = Script(runs__get=looks, runs__stop=[STOPPED])
    stop(driver, session(driver), script, insist_for=10.0)
    assert script.paths().count("runs/stop") == 2
    assert driver.clock.slept == [1.0, 1.0, 1.0]


def test_insisting_ends_with_its_time_and_with_the_run(driver: Driver) -> None:
    going = Script(runs__get=seen("running", "terminating"), runs__stop=[STOPPED])
    stop(driver, session(driver), going, insist_for=2.5)
    assert driver.clock.slept == [1.0, 1.0, 0.5]
    gone = Script(runs__get=[*seen("running"), MISSING], runs__stop=[STOPPED])
    stop(driver, session(driver), gone, insist_for=10.0)
    assert gone.paths() == ["runs/get", "runs/stop", "runs/get"]


def test_without_a_time_the_server_is_asked_and_left(driver: Driver) -> None:
    script = Script(runs__get=seen("running"), runs__stop=[LOST, STOPPED])
    stop(driver, session(driver), script)
    assert script.paths() == ["runs/get", "runs/stop", "runs/stop"]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


SLEEPER = {"type": "task", "commands": ["trap 'exit 3' INT", "while :; do sleep 0.05; done"]}


@pytest.mark.parametrize("by_name", [False, True])
def test_wait_gets_a_run_stopped_whose_first_stops_were_forgotten(server: LocalServer, by_name: bool) -> None:
    with server.client() as client:
        run = client.runs.submit(SLEEPER)
        server.faults.add("runs/stop", times=2, status=200, body="null")
        if by_name:
            client.runs.stop(run.name)
        else:
            run.stop()
        assert run.wait(60, poll_interval=0.05).status is dstack.RunStatus.TERMINATED
        assert server.faults.pending == 0


def test_async_wait_gets_a_run_stopped_whose_first_stops_were_forgotten(server: LocalServer) -> None:
    async def check() -> None:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            run = await client.runs.submit(SLEEPER)
            server.faults.add("runs/stop", times=2, status=200, body="null")
            await run.stop()
            assert (await run.wait(60, poll_interval=0.05)).status is dstack.RunStatus.TERMINATED
            assert server.faults.pending == 0

    asyncio.run(check())
