"""Attaching waits for the container, and leaves nothing open when it fails."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from dstack_core import _adrive
from dstack_core._attach.wait import attach
from dstack_core._flow.steps import Flow
from dstack_core._wire.api import Api
from dstack_core._wire.attach import Approach, Route
from dstack_core.errors import AttachError, RunNotFoundError
from tests.core.scripted import MISSING, Driver, Script, recorded, reply, run_json

USER = reply(recorded("users_get_my_user_0.22.5") | {"ssh_private_key": "PEM"})


class Connection:
    """A connection that records what happens to it."""

    def __init__(self, approach: Approach, route: Route, failure: AttachError | None = None) -> None:
        self.route = route
        self.failure = failure
        self.events: list[str] = []

    def open(self, private_key: str | None) -> None:
        self.events.append(f"open with {private_key}")
        if self.failure:
            raise self.failure

    def close(self) -> None:
        self.events.append("close")


def flow(made: list[Connection], failure: AttachError | None = None) -> Flow[Any]:
    def new(approach: Approach, route: Route) -> Connection:
        made.append(Connection(approach, route, failure))
        return made[-1]

    return attach(Api("http://s", "main"), "train", "id-1", new, node=0, poll_interval=5)


def test_it_waits_until_the_container_runs(driver: Driver) -> None:
    made: list[Connection] = []
    statuses = ["pending", "submitted", "provisioning", "running"]
    script = Script(runs__get=[reply(run_json(status)) for status in statuses], users__get_my_user=[USER])
    run, connection = driver.run(flow(made), script)
    assert (run.raw_status, connection) == ("running", made[0])
    assert made[0].events == ["open with PEM"]
    assert driver.clock.slept == [5, 5, 5]
    assert script.bodies("runs/get") == [{"id": "id-1"}] * 4


@pytest.mark.parametrize("status", ["done", "failed", "terminated", "terminating"])
def test_an_ended_or_ending_run_is_not_attached_to_and_no_key_is_requested(
    driver: Driver, status: str
) -> None:
    made: list[Connection] = []
    script = Script(runs__get=[reply(run_json(status))])
    run, connection = driver.run(flow(made), script)
    assert (run.raw_status, connection, made) == (status, None, [])
    assert script.paths() == ["runs/get"]


def test_a_deleted_run_raises_run_not_found(driver: Driver) -> None:
    with pytest.raises(RunNotFoundError):
        driver.run(flow([]), Script(runs__get=[MISSING]))


def test_a_connection_that_fails_to_open_is_closed(driver: Driver) -> None:
    made: list[Connection] = []
    script = Script(runs__get=[reply(run_json("running"))], users__get_my_user=[USER])
    with pytest.raises(AttachError, match="no way"):
        driver.run(flow(made, AttachError("no way")), script)
    assert made[0].events == ["open with PEM", "close"]


def test_without_a_key_on_the_server_the_connection_opens_with_none(driver: Driver) -> None:
    made: list[Connection] = []
    user = reply(recorded("users_get_my_user_0.18.44"))
    driver.run(flow(made), Script(runs__get=[reply(run_json("running"))], users__get_my_user=[user]))
    assert made[0].events == ["open with None"]


def test_cancelling_closes_the_connection_that_is_being_opened() -> None:
    opening, closed = threading.Event(), threading.Event()

    class Slow(Connection):
        def open(self, private_key: str | None) -> None:
            opening.set()
            assert closed.wait(30)

        def close(self) -> None:
            closed.set()

    script = Script(runs__get=[reply(run_json("running"))], users__get_my_user=[USER])
    slow = attach(Api("http://s", "main"), "train", "id-1", Slow, node=0, poll_interval=5)

    async def scenario() -> None:
        task = asyncio.create_task(_adrive.arun(slow, script.asend))
        assert await asyncio.to_thread(opening.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()

    asyncio.run(scenario())
