"""The waiting calls, sync and async: time limits, retry budgets, the caller's own sleep and events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._flow.retry import TimeLimit, within
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.local import LocalServer
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, Driver, Script, reply, run_json


def session(driver: Driver) -> Operations:
    return Operations(Api("http://server", "main"), 30.0, clock=driver.clock, wall_clock=driver.clock)


def wait(driver: Driver, script: Script, timeout: float | None, retry_budget: float = 600.0) -> Any:
    flow = session(driver).follow(
        Progress("train", "id-1"), poll_interval=5, logs=False, retry_budget=retry_budget
    )
    limit = None if timeout is None else TimeLimit(timeout, "too long", "http://page", driver.clock)
    return driver.run(within(flow, limit), script)


def test_no_retry_is_announced_beyond_the_timeout(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dstack_core")
    script = Script(runs__get=[reply(run_json("running")), LOST])
    with pytest.raises(dstack.WaitTimeoutError) as caught:
        wait(driver, script, timeout=8)
    assert caught.value.message.startswith(
        "too long, and the server does not answer (http://server (project main"
    )
    assert caught.value.message.endswith("Connection refused). It may still be running: http://page")
    assert "Connection refused. Retrying for another 3 s." in caplog.text
    assert "600" not in caplog.text
    assert driver.clock.now == 1008.0


def test_waiting_gives_up_on_an_unreachable_server_after_the_retry_budget(driver: Driver) -> None:
    script = Script(runs__get=[reply(run_json("running")), LOST])
    with pytest.raises(dstack.ServerUnreachableError):
        wait(driver, script, timeout=None, retry_budget=7.0)
    assert driver.clock.now <= 1013.0


def test_a_request_ends_with_the_time_limit(driver: Driver) -> None:
    timeouts: list[float | None] = []
    script = Script(runs__get=[reply(run_json("running"))])
    send = script.send

    def noted(request: Any) -> Any:
        timeouts.append(request.timeout)
        return send(request)

    script.send = noted  # type: ignore[method-assign]
    with pytest.raises(dstack.WaitTimeoutError):
        wait(driver, script, timeout=12)
    assert timeouts == [12.0, 7.0, 2.0, 2.0]


@pytest.mark.parametrize("what", ["get", "follow"])
def test_get_and_follow_end_with_their_time_limit(driver: Driver, what: str) -> None:
    """Reply after 5 s: no request takes longer than the time that is left, and none begins after the limit."""
    ours = session(driver)
    timeouts: list[float] = []

    def slow(request: Any) -> Any:
        timeouts.append(min(request.timeout, 5.0))
        driver.clock.now += timeouts[-1]
        if what == "get" or request.timeout < 5.0:
            raise LOST
        return reply(run_json("running"))

    script = Script(runs__get=[reply(run_json("running"))])
    script.send = slow  # type: ignore[method-assign]
    if what == "get":
        flow: Any = ours.get("train", timeout=8.0, retry_budget=600)
    else:
        snapshot = Driver("sync").run(
            session(driver).get("train"), Script(runs__get=[reply(run_json("running"))])
        )
        flow = dstack.Run(ours, None, snapshot)._follow(  # type: ignore[arg-type]
            None, timeout=8.0, poll_interval=1.0, logs=False, retry_budget=600
        )
    with pytest.raises(dstack.WaitTimeoutError):
        driver.run(flow, script)
    assert timeouts[0] == 5.0
    assert driver.clock.now <= 1008.1


class Leave(Exception):
    """An exception that ends a wait from the caller's own sleep."""


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


def test_every_waiting_call_takes_a_sleep_and_an_event_callback(server: LocalServer) -> None:
    slept: list[float] = []
    events: list[dstack.Event] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)

    with server.client() as client:
        server.faults.add("/runs/apply", status=503)
        run = client.runs.submit(
            {"type": "task", "commands": ["sleep 600"]}, sleep=sleep, on_event=events.append
        )
        assert len(slept) == 1
        server.faults.add("/runs/get", status=503)
        found = client.runs.get(run.name, retry_budget=5, sleep=sleep, on_event=events.append)
        assert found is not None
        assert len(slept) == 2
        assert [type(event) for event in events[-2:]] == [dstack.ContactLost, dstack.ContactRestored]

        def leave(seconds: float) -> None:
            raise Leave

        with pytest.raises(Leave):
            run.wait(sleep=leave)
        assert run.last_status is dstack.RunStatus.RUNNING or not run.last_status.is_finished
        server.faults.forget_stops()
        with pytest.raises(Leave):
            run.stop(until="ended", sleep=leave)
        run.stop(abort=True)


def test_the_async_twins_do_so_too(server: LocalServer) -> None:
    slept: list[float] = []
    events: list[dstack.Event] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def leave(seconds: float) -> None:
        raise Leave

    async def check() -> None:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            server.faults.add("/runs/apply", status=503)
            run = await client.runs.submit(
                {"type": "task", "commands": ["sleep 600"]}, sleep=sleep, on_event=events.append
            )
            assert len(slept) == 1
            server.faults.add("/runs/get", status=503)
            assert await client.runs.get(run.name, retry_budget=5, sleep=sleep, on_event=events.append)
            assert len(slept) == 2
            assert [type(event) for event in events[-2:]] == [dstack.ContactLost, dstack.ContactRestored]
            with pytest.raises(Leave):
                await run.wait(sleep=leave)
            server.faults.forget_stops()
            with pytest.raises(Leave):
                await run.stop(until="ended", sleep=leave)
            await run.stop(abort=True)

    asyncio.run(check())


def test_a_wait_ends_in_time_on_a_slow_server(server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit({"type": "task", "commands": ["sleep 600"]})
        server.faults.slow(20.0)
        with pytest.raises(dstack.WaitTimeoutError, match="It may still be running: http"):
            run.wait(1.0, poll_interval=0.1)
        server.faults.clear()
        run.stop(abort=True)


def test_waiting_for_the_offers_of_a_slow_server_ends_in_time(server: LocalServer) -> None:
    with server.client() as client:
        server.faults.slow(20.0)
        with pytest.raises(dstack.WaitTimeoutError, match=r"returned no offers within 0\.5 s"):
            client.runs.plan({"type": "task", "commands": ["true"]}, timeout=0.5)
        server.faults.clear()
        assert client.runs.plan({"type": "task", "commands": ["true"]}, timeout=30).offers


def test_the_last_status_needs_no_request(server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit({"type": "task", "commands": ["true"]})
        run.wait(60, poll_interval=0.05)
        before = len(server.requests)
        assert run.last_status is dstack.RunStatus.DONE
        assert run.outcome() is not None
        assert len(server.requests) == before
