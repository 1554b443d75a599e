"""Compare watching many runs with a request each and with shared status reads, side by side.

Run it with ``python benchmarks/shared_polling.py``; it needs the extras ``async`` and ``local``. The server
is a script in a process of its own: it answers with run objects as a real one gives them, every run is active
and silent, and each changes its status once, at a moment it tells afterwards. ``staleness`` is the time from
there until the watcher was told. Both ways have one client, one event loop and the same poll interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import socket
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn

from dstack_core import AsyncClient, SharedAsyncClient, StatusChanged

_RUN = Path(__file__).parent.parent / "tests/data/wire/runs_get_running_ssh_fleet_0.22.5.json"
_PAGE = 100


class ScriptedServer:
    """Answer ``runs/get``, ``runs/list`` and ``logs/poll`` for a number of runs."""

    def __init__(self, number: int, seconds: float) -> None:
        body: dict[str, Any] = json.loads(_RUN.read_text())["response"]["json"]
        began = datetime(2026, 11, 23, tzinfo=UTC)
        # The monotonic clock is the same in all processes of a machine.
        start = time.monotonic() + seconds / 4
        chance = random.Random(7)  # noqa: S311 - the same moments for both ways
        self.requests: dict[str, int] = {}
        self.sent_bytes = 0
        self.changes = [start + chance.random() * seconds / 2 for _ in range(number)]
        self._bodies: list[tuple[bytes, bytes]] = []
        self._submitted: list[str] = []
        for index in range(number):
            submitted = (began + timedelta(seconds=index)).isoformat()
            self._submitted.append(submitted)
            body |= {"id": f"id-{index}", "submitted_at": submitted}
            body["run_spec"]["run_name"] = f"run-{index}"
            self._bodies.append(
                (
                    json.dumps(body | {"status": "running"}).encode(),
                    json.dumps(body | {"status": "terminating"}).encode(),
                )
            )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        if message["type"] == "http.disconnect":
            return
        asked = json.loads(body)
        path = "/".join(scope["path"].split("/")[-2:])
        self.requests[path] = self.requests.get(path, 0) + 1
        if path == "runs/get":
            name = asked.get("id") or asked["run_name"]
            answer = self._run(int(name.rpartition("-")[2]))
        elif path == "runs/list":
            top = int(asked.get("prev_run_id", f"id-{len(self._bodies)}").removeprefix("id-"))
            runs = [self._run(index) for index in range(top - 1, max(-1, top - 1 - _PAGE), -1)]
            answer = b"[" + b",".join(runs) + b"]"
        else:
            answer = b'{"logs": [], "next_token": null}'
        self.sent_bytes += len(answer)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _run(self, index: int) -> bytes:
        return self._bodies[index][time.monotonic() >= self.changes[index]]


def serve(number: int, seconds: float, told: Connection) -> None:
    """Serve in this process until told to end; then tell what was asked for."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    app = ScriptedServer(number, seconds)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        told.send((listener.getsockname()[1], app.changes))
        await asyncio.to_thread(told.recv)
        told.send((app.requests, app.sent_bytes))
        server.should_exit = True
        await serving

    asyncio.run(run())


@dataclass(frozen=True)
class Measured:
    """Hold what one way of watching cost."""

    looks: int
    log_reads: int
    megabytes: float
    cpu_seconds: float
    staleness: list[float]

    @property
    def requests(self) -> int:
        return self.looks + self.log_reads

    def row(self, name: str, number: int) -> str:
        median = statistics.median(self.staleness)
        worst = statistics.quantiles(self.staleness, n=100)[98]
        return (
            f"| {number} | {name} | {self.looks} | {self.log_reads} | {self.megabytes:.1f} "
            f"| {self.cpu_seconds:.2f} | {median:.2f} | {worst:.2f} |"
        )


async def watch(
    kind: type[AsyncClient], port: int, changes: list[float], seconds: float, interval: float, logs: bool
) -> tuple[float, list[float]]:
    """Watch all runs; return the CPU seconds of this process and the staleness of every change seen."""
    staleness: list[float] = []
    chance = random.Random(11)  # noqa: S311 - the same moments for both ways

    async with kind(
        server_url=f"http://127.0.0.1:{port}",
        project_name="main",
        user_token="benchmark",  # noqa: S106 - nobody checks it
    ) as client:

        async def one(index: int, delay: float) -> None:
            await asyncio.sleep(delay)
            run = await client.runs.get(f"run-{index}")
            if run is None:
                raise RuntimeError("the scripted server has no such run")
            async for event in run.follow(poll_interval=interval, logs=logs):
                if isinstance(event, StatusChanged) and event.status == "terminating":
                    staleness.append(time.monotonic() - changes[index])

        used = time.process_time()
        tasks = [asyncio.create_task(one(index, chance.random() * interval)) for index in range(len(changes))]
        await asyncio.sleep(seconds)
        used = time.process_time() - used
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return used, staleness


def measure(kind: type[AsyncClient], number: int, seconds: float, interval: float, logs: bool) -> Measured:
    """Watch ``number`` runs in one way."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(number, seconds, theirs))
    server.start()
    port, changes = ours.recv()
    cpu_seconds, staleness = asyncio.run(watch(kind, port, changes, seconds, interval, logs))
    ours.send("end")
    requests, sent_bytes = ours.recv()
    server.join()
    looks = requests.get("runs/get", 0) + requests.get("runs/list", 0)
    if len(staleness) < number:
        print(f"{number - len(staleness)} of {number} changes were not seen in time")
    return Measured(looks, requests.get("logs/poll", 0), sent_bytes / 1e6, cpu_seconds, staleness)


def main() -> None:
    """Print a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watched", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--interval", type=float, default=5.0)
    parser.add_argument("--no-logs", action="store_true")
    chosen = parser.parse_args()
    lines = [
        "| runs | way | status reads | log reads | MB | CPU s | staleness p50 s | p99 s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for number in chosen.watched:
        settings = (number, chosen.seconds, chosen.interval, not chosen.no_logs)
        alone, shared = measure(AsyncClient, *settings), measure(SharedAsyncClient, *settings)
        lines += [alone.row("a request each", number), shared.row("shared", number)]
        ratios.append(
            f"{number} runs: {alone.looks / shared.looks:.0f} times fewer status reads, "
            f"{alone.requests / shared.requests:.1f} times fewer requests with the log reads, "
            f"{alone.cpu_seconds / shared.cpu_seconds:.1f} times less CPU"
        )
    print("\n".join([*lines, "", *ratios]))


if __name__ == "__main__":
    main()
