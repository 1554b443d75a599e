"""Wrong arguments of the waiting calls are refused before any request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.integration import RunRef, stop_run
from dstack_core.local import LocalServer

NAN = float("nan")


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


@pytest.fixture(scope="module")
def run(server: LocalServer) -> Iterator[dstack.Run]:
    with server.client() as client:
        run = client.runs.submit({"type": "task", "commands": ["sleep 600"]})
        yield run
        run.stop(abort=True)


class Log:
    def log(self, level: int, msg: str, /, *args: Any) -> None:
        raise AssertionError(msg % args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, _: run.stop(timeout=-1), "timeout: expected more than 0 seconds, got -1."),
        (lambda run, _: run.stop(timeout=0), "timeout: expected more than 0 seconds, got 0."),
        (lambda run, _: run.stop(timeout=NAN), "timeout: expected more than 0 seconds, got nan."),
        (lambda run, _: run.stop(timeout="x"), "timeout: expected more than 0 seconds, got 'x'."),
        (
            lambda run, _: run.stop(until="soon"),
            "until: expected one of 'accepted', 'stopping', 'ended', got 'soon'.",
        ),
        (lambda run, _: run.stop(sleep=5), "sleep: expected a function, got 5."),
        (lambda run, _: run.wait(sleep=5), "sleep: expected a function, got 5."),
        (lambda run, _: run.wait(on_event=5), "on_event: expected a function, got 5."),
        (lambda run, _: run.wait(timeout=-1), "timeout: expected 0 seconds or more, got -1."),
        (lambda run, _: run.wait(retry_budget=-1), "retry_budget: expected 0 seconds or more, got -1."),
        (lambda run, _: run.wait(poll_interval=0), "poll_interval: expected more than 0 seconds, got 0."),
        (
            lambda run, _: next(run.follow(timestamps="x")),
            "timestamps: expected True or False, got 'x'.",
        ),
        (
            lambda run, _: next(run.follow(utilization=1)),
            "utilization: expected True or False, got 1.",
        ),
        (lambda run, _: next(run.follow(sleep=5)), "sleep: expected a function, got 5."),
        (
            lambda run, _: next(run.follow(retry_budget=-1)),
            "retry_budget: expected 0 seconds or more, got -1.",
        ),
        (
            lambda run, client: client.runs.get(run.name, retry_budget=-1),
            "retry_budget: expected 0 seconds or more, got -1.",
        ),
        (
            lambda run, client: client.runs.stop(run.name, timeout=-1),
            "timeout: expected more than 0 seconds, got -1.",
        ),
        (
            lambda run, client: client.runs.submit({"type": "task", "commands": ["true"]}, sleep=5),
            "sleep: expected a function, got 5.",
        ),
        (
            lambda run, client: client.runs.plan({"type": "task", "commands": ["true"]}, timeout=-1),
            "timeout: expected more than 0 seconds, got -1.",
        ),
        (
            lambda run, client: stop_run(client, RunRef(run.name, ""), timeout=-1, log=Log()),
            "timeout: expected more than 0 seconds, got -1.",
        ),
    ],
)
def test_one_error_names_the_parameter_and_nothing_is_sent(
    server: LocalServer, run: dstack.Run, call: Callable[[dstack.Run, dstack.Client], Any], message: str
) -> None:
    with server.client() as client:
        before = len(server.requests)
        with pytest.raises(dstack.ConfigurationError) as caught:
            call(run, client)
        assert caught.value.message == message
        assert len(server.requests) == before


@pytest.mark.parametrize("name", ["timeout", "connect_timeout", "retry_budget"])
def test_a_client_refuses_times_that_make_no_sense(name: str) -> None:
    arguments: dict[str, Any] = {"server_url": "http://x", "project_name": "x", "user_token": "x", name: -1}
    with pytest.raises(dstack.ConfigurationError, match=f"{name}: expected"):
        dstack.Client(**arguments)


def test_a_wait_that_never_reached_the_server_does_not_claim_that_the_run_keeps_running(
    run: dstack.Run,
) -> None:
    with LocalServer() as gone, gone.client() as client:
        lost = client.runs.submit({"type": "task", "commands": ["sleep 600"]})
        gone.stop()
        with pytest.raises(
            dstack.WaitTimeoutError, match=r"the server does not answer .* It may still be running"
        ):
            lost.wait(timeout=1.0)
