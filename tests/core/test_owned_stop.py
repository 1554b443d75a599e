"""A stop on behalf of a task: what is logged before it and after it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.integration import RunRef, StopResult, StopState, astop_run, stop_run
from dstack_core.local import LocalServer

SLEEPER = {"type": "task", "commands": ["trap 'exit 3' INT", "while :; do sleep 0.05; done"]}
GENERATED = RunRef("ours", "mine", generated=True)
CHOSEN = RunRef("ours", "mine")


class Log:
    """A log that records each line and how many requests the server had received by then."""

    def __init__(self, server: LocalServer) -> None:
        self._server = server
        self.lines: list[tuple[int, str]] = []
        self.requests: list[int] = []

    def log(self, level: int, msg: str, *args: Any) -> None:
        self.requests.append(len(self._server.requests))
        self.lines.append((level, msg % args))


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer(stop_grace_seconds=1.0) as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def submitted(server: LocalServer, marker: str = "mine") -> dstack.Run:
    return server.client().runs.submit(SLEEPER, "ours", marker=marker)


def stopped(way: str, server: LocalServer, log: Log, ref: RunRef, **how: Any) -> StopResult:
    how = {"timeout": 20.0, **how}
    if way == "sync":
        with server.client() as client:
            return stop_run(client, ref, log=log, **how)

    async def stop() -> StopResult:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            return await astop_run(client, ref, log=log, **how)

    return asyncio.run(stop())


@pytest.mark.parametrize("ref", [GENERATED, CHOSEN])
def test_the_first_line_precedes_every_request_and_names_run_and_page(
    way: str, server: LocalServer, ref: RunRef
) -> None:
    run = submitted(server)
    log, before = Log(server), len(server.requests)
    result = stopped(way, server, log, ref, run_id=run.id, submitted=True)
    assert log.lines[0] == (logging.WARNING, f"Stopping run ours: {run.url}")
    assert log.requests[0] == before
    # Where the machine is busy, the run has ended by the next reply.
    assert log.lines[1:] in (
        [(logging.INFO, "Run ours is stopping.")],
        [(logging.INFO, "Run ours was stopped on request.")],
    )
    assert result.is_safe
    first = server.requests[before].path.rsplit("/", 1)[1]
    assert first == ("stop" if ref.generated else "get")


def test_an_end_that_is_waited_for_is_logged(way: str, server: LocalServer) -> None:
    submitted(server)
    log = Log(server)
    result = stopped(way, server, log, GENERATED, until="ended")
    assert result.state is StopState.ENDED
    assert log.lines[0] == (logging.WARNING, f"Stopping run ours: {server.url}/runs")
    assert log.lines[1] == (logging.INFO, "Run ours was stopped on request.")


def test_a_run_that_has_already_ended_is_not_an_error(way: str, server: LocalServer) -> None:
    run = server.client().runs.submit({"type": "task", "commands": ["true"]}, "ours", marker="mine")
    run.wait(60, poll_interval=0.05)
    log = Log(server)
    assert stopped(way, server, log, CHOSEN).state is StopState.ENDED
    assert [level for level, _ in log.lines] == [logging.WARNING, logging.INFO]
    assert stopped(way, server, log, RunRef("nowhere", "mine")).state is StopState.MISSING
    assert log.lines[-1] == (logging.INFO, "There is no run nowhere to stop.")


def test_the_run_of_another_owner_is_left_alone(way: str, server: LocalServer) -> None:
    run = submitted(server, marker="theirs")
    log = Log(server)
    assert stopped(way, server, log, CHOSEN, submitted=True).state is StopState.OTHER_OWNER
    assert log.lines[-1][1].startswith("Run ours belongs to another owner now; it was left alone: ")
    assert run.refresh().outcome() is None


def test_the_log_of_a_refused_stop_names_what_to_do(way: str, server: LocalServer) -> None:
    run = submitted(server)
    body = {"detail": {"msg": "Access denied", "code": None}}
    server.faults.add("/runs/stop", times=None, status=403, body=body)
    log = Log(server)
    assert stopped(way, server, log, GENERATED, run_id=run.id).state is StopState.REFUSED
    level, text = log.lines[-1]
    assert level == logging.ERROR
    assert text.startswith("The server refused to stop run ours: ")
    assert text.count("Ask ") == 1
    assert text.endswith(f"The run keeps running, until its max_duration if it has one: {run.url}")


def test_a_server_that_drops_every_stop_is_reported_as_an_error(way: str, server: LocalServer) -> None:
    run = submitted(server)
    server.faults.forget_stops(times=None)
    log = Log(server)
    result = stopped(way, server, log, GENERATED, run_id=run.id, timeout=3.0)
    assert (result.state, result.requests) == (StopState.UNCONFIRMED, 2)
    level, text = log.lines[-1]
    assert level == logging.ERROR
    assert text == (
        "Could not confirm that run ours is stopping: the server accepted the stop (2 requests), but the run is "
        "still running. It may keep running, until its max_duration if it has one. Check it and stop it on its "
        f"page: {run.url}"
    )


def test_a_stop_reaches_a_server_that_answers_after_the_time_limit(way: str, server: LocalServer) -> None:
    run = submitted(server)
    server.faults.slow(3.0)
    log = Log(server)
    result = stopped(way, server, log, CHOSEN, run_id=run.id, submitted=True, timeout=4.0)
    assert (result.state, result.requests) == (StopState.UNCONFIRMED, 1)
    assert log.lines[-1][0] == logging.ERROR
    server.faults.clear()
    assert run.wait(30, poll_interval=0.1).status is dstack.RunStatus.TERMINATED


def test_the_reason_is_in_the_first_line(way: str, server: LocalServer) -> None:
    run = submitted(server)
    log = Log(server)
    stopped(way, server, log, GENERATED, run_id=run.id, reason="the flow run was cancelled")
    assert log.lines[0][1] == f"Stopping run ours (the flow run was cancelled): {run.url}"


def test_an_unconfirmed_stop_names_what_else_stops_the_run(way: str, server: LocalServer) -> None:
    run = submitted(server)
    server.faults.forget_stops(times=None)
    log = Log(server)
    stopped(way, server, log, GENERATED, run_id=run.id, timeout=2.0, backstop="The reaper stops it")
    assert log.lines[-1][1].endswith(
        "It may keep running, until its max_duration if it has one. The reaper stops it. "
        f"Check it and stop it on its page: {run.url}"
    )


class Pulled(BaseException):
    """An interrupt, such as a second Ctrl-C."""


@pytest.mark.parametrize("accepted", [False, True])
def test_an_interrupted_stop_writes_its_last_line(way: str, server: LocalServer, accepted: bool) -> None:
    run = submitted(server)
    if accepted:
        server.faults.forget_stops(times=None)
    else:
        server.faults.add("/runs/stop", times=None, status=503)
    log = Log(server)

    def pull(seconds: float) -> None:
        raise Pulled

    async def apull(seconds: float) -> None:
        raise Pulled

    with pytest.raises(Pulled):
        stopped(way, server, log, GENERATED, run_id=run.id, sleep=pull if way == "sync" else apull)
    known = "was interrupted after the server had accepted it" if accepted else "It may keep running"
    assert [level for level, _ in log.lines] == [logging.WARNING, logging.ERROR]
    assert log.lines[1][1].startswith("The stop of run ours was interrupted")
    assert known in log.lines[1][1]
    assert log.lines[1][1].endswith(run.url)


def until_asked(server: LocalServer) -> None:
    deadline = time.monotonic() + 60
    while not any(request.path.endswith("/runs/stop") for request in server.requests):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cancelled_task_writes_the_last_line_before_it_ends(server: LocalServer) -> None:
    """Cancel while the request is under way; only the closing of the flow reports that."""
    run = submitted(server)
    server.faults.add("/runs/stop", times=None, delay=30)
    log = Log(server)

    async def cancel() -> None:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            task = asyncio.create_task(astop_run(client, GENERATED, timeout=20.0, log=log, run_id=run.id))
            await asyncio.to_thread(until_asked, server)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert log.lines[-1][1].startswith("The stop of run ours was interrupted. It may keep running")

    asyncio.run(cancel())


@pytest.mark.parametrize("known", [True, False])
def test_an_accepted_stop_is_reported_once_and_at_once(way: str, server: LocalServer, known: bool) -> None:
    """Cover also a run whose id is known only from the poll after the stop."""
    run = submitted(server)
    server.faults.forget_stops(times=2)
    accepted: list[tuple[StopResult, int]] = []

    def note(result: StopResult) -> None:
        accepted.append((result, sum("/runs/stop" in request.path for request in server.requests)))

    run_id = run.id if known else None
    result = stopped(way, server, Log(server), GENERATED, run_id=run_id, timeout=4.0, on_accepted=note)
    ((first, stops),) = accepted
    assert (first.state, first.run_id, first.url, stops) == (StopState.ACCEPTED, run.id, run.url, 1)
    assert result.requests == 2


def test_a_stop_that_was_not_accepted_is_not_reported(way: str, server: LocalServer) -> None:
    run = submitted(server)
    accepted: list[StopResult] = []
    body = {"detail": {"msg": "Access denied", "code": None}}
    server.faults.add("/runs/stop", times=1, status=403, body=body)
    how: dict[str, Any] = {"run_id": run.id, "timeout": 2.0, "on_accepted": accepted.append}
    assert stopped(way, server, Log(server), GENERATED, **how).state is StopState.REFUSED
    server.faults.add("/runs/stop", times=None, status=503)
    assert stopped(way, server, Log(server), GENERATED, **how).state is StopState.UNCONFIRMED
    other = RunRef("ours", "another")
    assert (
        stopped(way, server, Log(server), other, on_accepted=accepted.append).state is StopState.OTHER_OWNER
    )
    assert accepted == []
