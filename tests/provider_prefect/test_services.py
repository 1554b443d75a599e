"""Services: the wait until they answer, and what may end it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from prefect import flow

from dstack_core import (
    ConfigurationError,
    RunFailedError,
    ServerUnreachableError,
)
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    astop_run,
    asubmit_run,
    await_for_service,
    stop_run,
    submit_run,
    wait_for_service,
)
from tests.ports import free_port

from .support import interrupt_when_asked, outcome_of, the_run, until

pytestmark = pytest.mark.usefixtures("prefect_server")

LONG = {"type": "task", "commands": ["echo started; sleep 60"]}


def service(port: int, command: str) -> dict[str, Any]:
    return {"type": "service", "port": port, "commands": [command]}


@pytest.mark.parametrize("twin", [False, True])
def test_a_service_is_waited_for_until_it_answers(
    twin: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    port = free_port()
    serving = service(port, f"sleep 1; exec python3 -m http.server {port} --bind 127.0.0.1")

    @flow
    def used() -> Any:
        run = submit_run(serving, credentials)
        url = wait_for_service(run, credentials, poll_interval=0.2)
        stop_run(run, credentials)
        return url

    @flow
    async def aused() -> Any:
        run = await asubmit_run(serving, credentials)
        url = await await_for_service(run, credentials, poll_interval=0.2)
        await astop_run(run, credentials)
        return url

    url = asyncio.run(aused()) if twin else used()
    assert url == the_run(dstack).service_url


@pytest.mark.parametrize(
    ("configuration", "error"),
    [(service(8000, "exit 3"), RunFailedError), (LONG, ConfigurationError)],
    ids=["ends-before", "no-service"],
)
def test_a_run_that_will_never_answer_is_an_error(
    configuration: dict[str, Any], error: type[Exception], credentials: DstackCredentials
) -> None:
    @flow
    def used() -> None:
        wait_for_service(submit_run(configuration, credentials), credentials, poll_interval=0.2)

    with pytest.raises(error):
        used()


@pytest.mark.parametrize("twin", [False, True])
def test_an_unreachable_server_ends_the_wait_for_a_service(
    twin: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    def silence() -> None:
        until(lambda: any("/proxy/services/" in request.path for request in dstack.requests))
        dstack.faults.add("/runs/get", status=503, times=None)

    @flow
    def waiting() -> None:
        run = submit_run(service(8000, "sleep 60"), credentials)
        wait_for_service(run, credentials, poll_interval=0.2, retry_budget=1)

    @flow
    async def awaiting() -> None:
        run = await asubmit_run(service(8000, "sleep 60"), credentials)
        await await_for_service(run, credentials, poll_interval=0.2, retry_budget=1)

    thread = threading.Thread(target=silence)
    thread.start()
    with pytest.raises(ServerUnreachableError):
        asyncio.run(awaiting()) if twin else waiting()
    thread.join()


def test_a_cancellation_stops_the_service_that_is_waited_for(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def waiting() -> None:
        run = submit_run(service(8000, "sleep 60"), credentials)
        wait_for_service(run, credentials, poll_interval=0.2)

    thread = interrupt_when_asked(dstack, "/proxy/services/")
    with pytest.raises(KeyboardInterrupt):
        waiting()
    thread.join()
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"
