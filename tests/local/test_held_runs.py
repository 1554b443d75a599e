"""Held runs where every reply of the server is late: recognised as on a quick one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.integration import Attempt, AttemptNames, choose_attempt
from dstack_core.local import LocalServer

# Seconds that each reply takes.
_SLOW = 1.0
# A held run is recognised by the poll that shows it, and the page of the log behind it.
_REQUESTS = 8
FAILING = {"type": "task", "commands": ["echo started", "exit 3"]}


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer(step_seconds=0.01) as server:
        server.faults.slow(_SLOW)
        yield server


def assert_held(outcome: dstack.Outcome, seconds: float) -> None:
    assert (outcome.status, outcome.exit_status) == (dstack.RunStatus.FAILED, 3)
    assert (outcome.debug_seconds, outcome.category) == (600, "user.exit")
    assert outcome.debug_command == f"python -m dstack_core attach {outcome.run_name}"
    with pytest.raises(dstack.RunFailedError, match=f"open a shell in it: {outcome.debug_command}"):
        outcome.raise_for_status()
    assert seconds < _REQUESTS * _SLOW + 10, "the task waits for no more than a few replies"


def test_a_held_run_on_a_slow_server(server: LocalServer) -> None:
    with server.client() as client:
        began = time.monotonic()
        run = client.runs.submit(FAILING, "slow", debug_on_failure="10m")
        assert_held(run.wait(60, poll_interval=0.1), time.monotonic() - began)
        assert run.is_held()
        names = AttemptNames("other", "engine:job/1", "slow")
        server.faults.clear()
        assert choose_attempt(client, names, Attempt(names.ref(1))) is None
        run.stop(until="ended", timeout=60)


def test_the_async_twin(server: LocalServer) -> None:
    async def body() -> None:
        given: dict[str, Any] = {
            "server_url": server.url,
            "project_name": server.project,
            "user_token": server.token,
        }
        async with dstack.AsyncClient(**given) as client:
            began = time.monotonic()
            run = await client.runs.submit(FAILING, "slow", debug_on_failure="10m")
            assert_held(await run.wait(60, poll_interval=0.1), time.monotonic() - began)
            server.faults.clear()
            await run.stop(until="ended", timeout=60)

    asyncio.run(body())
