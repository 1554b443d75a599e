"""Virtual time: waits are jumped over, work is not, and nothing of it stays."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time as real
from typing import Any

import pytest

from dstack_core import AsyncClient, ServerUnreachableError, SharedAsyncClient, WaitTimeoutError, clock
from dstack_core.local import LocalServer, VirtualTime
from dstack_core.local.job_sleep import seconds_of

LONG: dict[str, Any] = {"type": "task", "name": "train", "commands": ["echo a; sleep 50m; echo b"]}


def test_an_hour_passes_in_seconds_in_all_clocks() -> None:
    began = real.monotonic()
    with VirtualTime() as time, LocalServer() as server, server.client() as client:
        outcome = client.runs.submit(LONG).wait(poll_interval=20)
        assert real.monotonic() - began < 60
        assert 3000 < time.passed < 3100
        assert 3000 < (outcome.duration or 0) < 3100
        assert 0.9 < (outcome.cost or 0) < 1.1
        assert time.skipped > 2900
        times = [request.time for request in server.requests]
        assert times[-1] - times[0] > 2900
        assert server.runs[0].log == ("a", "b")


def test_work_takes_the_time_that_it_takes() -> None:
    with VirtualTime() as time, LocalServer() as server, server.client() as client:
        command = f"{sys.executable} -c 'import time; time.sleep(1.2)'"
        task = {"type": "task", "commands": [command], "max_duration": "10m"}
        outcome = client.runs.submit(task).wait(poll_interval=0.5, timeout=300)
        assert outcome.succeeded
        # No time limit passes because the machine is slow.
        assert time.passed < 100


def test_a_limit_of_the_caller_passes_in_virtual_time() -> None:
    with VirtualTime() as time, LocalServer() as server, server.client() as client:
        run = client.runs.submit(LONG)
        with pytest.raises(WaitTimeoutError):
            run.wait(timeout=600, poll_interval=20)
        assert 600 <= time.passed < 660


def test_an_unreachable_server_is_retried_for_the_budget() -> None:
    with VirtualTime() as time, LocalServer() as server, server.client() as client:
        server.faults.add(path="runs/list", times=None, status=503)
        with pytest.raises(ServerUnreachableError, match="retry budget 30 s"):
            client.runs.list()
        assert 30 <= time.passed < 60


def test_the_limit_of_a_run_ends_it() -> None:
    with VirtualTime(), LocalServer() as server, server.client() as client:
        outcome = client.runs.submit({**LONG, "max_duration": "10m"}).wait(poll_interval=20)
        assert outcome.reason == "max_duration_exceeded"
        assert 600 <= (outcome.duration or 0) < 660


@pytest.mark.parametrize("kind", [AsyncClient, SharedAsyncClient])
def test_async_clients_jump_together(kind: type[AsyncClient]) -> None:
    async def one(client: AsyncClient, number: int) -> str:
        run = await client.runs.submit({**LONG, "name": f"train-{number}"})
        return str((await run.wait(poll_interval=60)).status)

    async def all_of_them(server: LocalServer) -> list[str]:
        async with kind(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(3)))

    with VirtualTime() as time, LocalServer() as server:
        assert asyncio.run(all_of_them(server)) == ["done"] * 3
        assert 3000 < time.passed < 3600


def test_slow_replies_pass_at_once() -> None:
    began = real.monotonic()
    with VirtualTime() as time, LocalServer() as server, server.client() as client:
        server.scenarios.slow(20)
        client.runs.list()
        # Listing runs may be more than one request.
        assert 20 <= time.passed < 100
        assert real.monotonic() - began < 15


def test_two_threads_that_wait_take_turns() -> None:
    order = []

    def wait(seconds: float) -> None:
        clock.sleep(seconds)
        order.append(seconds)

    with VirtualTime() as time:
        threads = [threading.Thread(target=wait, args=(seconds,)) for seconds in (900.0, 300.0, 600.0)]
        with clock.Work():
            for thread in threads:
                thread.start()
            real.sleep(0.5)
        for thread in threads:
            thread.join(30)
        assert order == [300.0, 600.0, 900.0]
        assert 900 <= time.passed < 960


def test_nothing_stays() -> None:
    time = VirtualTime()
    with time:
        assert clock.is_virtual()
        time.sleep(1000)
        with pytest.raises(RuntimeError, match="already running"):
            time.__enter__()
        with pytest.raises(ValueError, match="expected seconds of 0 or more, got -1"):
            time.sleep(-1)
        left = threading.Thread(target=clock.sleep, args=(3600,))
        left.start()
        # Time does not run away: this thread works.
        assert time.passed < 1100 or left.is_alive() is False
    left.join(30)
    assert not left.is_alive()
    assert not clock.is_virtual()
    assert abs(clock.monotonic() - real.monotonic()) < 5
    assert abs(clock.epoch() - real.time()) < 5
    assert "dstack-virtual-time" not in {thread.name for thread in threading.enumerate()}


def test_slices_are_real_and_the_wait_is_virtual() -> None:
    calls = []

    async def after() -> bool:
        calls.append("async")
        return False

    with VirtualTime() as time:
        clock.sleep_in_slices(600, 5, lambda: calls.append("sync"))
        assert calls == ["sync"]
        clock.sleep_in_slices(0, 5, lambda: calls.append("sync"))
        asyncio.run(clock.asleep_in_slices(600, 5, after))
        assert calls == ["sync", "sync", "async"]
        assert 1200 <= time.passed < 1260
    calls.clear()
    clock.sleep_in_slices(0.05, 0.02, lambda: calls.append("sync"))
    assert len(calls) >= 2
    clock.sleep_in_slices(3600, 0.01, lambda: True)
    asyncio.run(clock.asleep_in_slices(0, 0.01, after))


@pytest.mark.parametrize(
    ("arguments", "seconds"), [(["10"], 10), (["1.5m", "1s"], 91), (["1h"], 3600), (["2d"], 172800)]
)
def test_the_sleep_command_reads_durations(arguments: list[str], seconds: float) -> None:
    assert seconds_of(arguments) == seconds


def test_a_wrong_sleep_command_fails_as_the_real_one_does() -> None:
    with VirtualTime(), LocalServer() as server, server.client() as client:
        outcome = client.runs.submit({"type": "task", "commands": ["sleep soon"]}).wait(poll_interval=1)
        assert outcome.exit_status == 1
        assert server.runs[0].log == ("sleep: invalid time interval: soon",)


def test_importing_changes_nothing() -> None:
    code = "import dstack_core.clock as c, sys; sys.exit(c.is_virtual() or 'asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
