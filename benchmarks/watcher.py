"""Watch many runs from one event loop on one core, in a process of its own, and print the cost.

``alone`` follows each run by itself, as triggers of other providers do; ``shared`` follows them with
``SharedAsyncClient``; ``triggers`` are real ``DstackRunTrigger`` objects, driven as Airflow's triggerer does.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstack_core import AsyncClient, SharedAsyncClient
from dstack_core._shared import batched_polls

_PROBE_SECONDS = 0.02
Watch = Callable[[str], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Watched:
    """The cost of one window of watching; lag in seconds, memory in bytes."""

    seconds: float
    cpu_seconds: float
    memory: int
    lag_p50: float
    lag_p99: float
    lag_worst: float
    wall_lag_p99: float
    longest_collection: float


class Lag:
    """The lag of the event loop, measured on a fixed schedule: a stall counts for as long as it takes.

    ``own`` is at most the CPU time that this process used meanwhile: its wait for a core does not count as lag.
    """

    def __init__(self) -> None:
        self.own: list[float] = []
        self.wall: list[float] = []

    async def probe(self) -> None:
        """Measure until cancelled."""
        due, used = time.perf_counter(), time.process_time()
        while True:
            due += _PROBE_SECONDS
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            now, cpu = time.perf_counter(), time.process_time()
            busy, used = cpu - used, cpu
            # Anything else that was due at one of the missed moments had to wait as well.
            while due <= now:
                self.wall.append(now - due)
                self.own.append(min(now - due, busy))
                due += _PROBE_SECONDS
            due -= _PROBE_SECONDS


class Collections:
    """The longest of Python's garbage collections, which pause the whole process."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        now = time.thread_time()
        if phase == "start":
            self._began = now
        else:
            self.longest = max(self.longest, now - self._began)


def share_under(late: list[float], share: float) -> float:
    """Return the lag that this share of the moments stayed under."""
    return sorted(late)[min(len(late) - 1, int(len(late) * share))]


def resident() -> int:
    """Return the resident memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def watch_all(watch: Watch, runs: int, warm: float, seconds: float) -> Watched:
    """Watch ``runs`` runs; measure a window of ``seconds`` after ``warm`` seconds."""
    before = resident()
    tasks = [asyncio.create_task(watch(f"run-{number}")) for number in range(runs)]
    await asyncio.sleep(warm)
    memory = resident() - before
    lag = Lag()
    probing = asyncio.create_task(lag.probe())
    collections = Collections()
    gc.callbacks.append(collections)
    started, used = time.perf_counter(), time.process_time()
    print("begin", flush=True)
    await asyncio.sleep(seconds)
    took, used = time.perf_counter() - started, time.process_time() - used
    probing.cancel()
    ended = [task for task in tasks if task.done()]
    if ended:
        raise RuntimeError(f"{len(ended)} of {runs} watches ended") from ended[0].exception()
    p50, p99, worst = (share_under(lag.own, share) for share in (0.5, 0.99, 1.0))
    wall_p99 = share_under(lag.wall, 0.99)
    measured = Watched(took, used, memory, p50, p99, worst, wall_p99, collections.longest)
    print(json.dumps(asdict(measured)), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return measured


def following(client: AsyncClient, interval: float) -> Watch:
    """Return a function that follows a run with one client."""

    async def watch(name: str) -> None:
        run = await client.runs.get(name)
        if run is None:
            raise RuntimeError(f"the server has no {name}")
        async for _ in run.follow(poll_interval=interval):
            pass

    return watch


def triggering(url: str, token: str, interval: float) -> Watch:
    """Return a function that runs a trigger, as the triggerer does."""
    from airflow_provider_dstack.triggers import DstackRunTrigger

    connection = {"conn_type": "dstack", "host": url, "login": "main", "password": token}
    os.environ["AIRFLOW_CONN_DSTACK_DEFAULT"] = json.dumps(connection)

    async def watch(name: str) -> None:
        trigger = DstackRunTrigger(
            dstack_conn_id="dstack_default",
            project_name=None,
            run_name=name,
            marker="",
            progress={"run_name": name},
            poll_interval=interval,
            on_kill_action="keep",
        )
        async for _ in trigger.run():
            pass

    return watch


async def main() -> None:
    """Watch, print ``begin`` when the window begins and the result as JSON when it ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=["alone", "shared", "triggers"], required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--interval", type=float, required=True)
    parser.add_argument("--warm", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--every-poll", action="store_true", help="read flowing logs as if few were watched")
    chosen = parser.parse_args()
    if chosen.every_poll:
        batched_polls.CROWD = sys.maxsize
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if chosen.way == "triggers":
        watch = triggering(chosen.url, chosen.token, chosen.interval)
        await watch_all(watch, chosen.runs, chosen.warm, chosen.seconds)
        return
    kind = SharedAsyncClient if chosen.way == "shared" else AsyncClient
    # With one request per run the client falls behind; the long timeout and budget keep it from giving up.
    async with kind(
        server_url=chosen.url,
        project_name="main",
        user_token=chosen.token,
        timeout=600.0,
        retry_budget=3600.0,
    ) as client:
        await watch_all(following(client, chosen.interval), chosen.runs, chosen.warm, chosen.seconds)


if __name__ == "__main__":
    asyncio.run(main())
