"""Read a long log with the client, sync and async, and with bare ``requests``, from the same server."""

from __future__ import annotations

import asyncio
import base64
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import requests

from benchmarks.results import Row, Section, Table, cli
from benchmarks.stub_server import Stub
from dstack_core import AsyncClient, Client, LogLines, SharedAsyncClient
from dstack_core.integration import LogRelay, RecordLimits, collect_secrets

SHARE = 0.8
# As many secret values as a run of a team may have; the run prints none of them.
ENV = {f"SECRET_{number}": f"{number}-of-a-team-{number * 7919:x}" for number in range(5)}


@dataclass(frozen=True)
class Log:
    """The contents of a log."""

    name: str
    lines: int
    line_bytes: int
    lines_a_message: int

    @property
    def megabytes(self) -> float:
        return self.lines * self.line_bytes / 1e6


def bare(url: str) -> int:
    """Fetch and decode the log with as little code as possible; return its lines."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {Stub.token}"
    body: dict[str, object] = {"run_name": "speaker", "job_submission_id": "sub-speaker", "limit": 1000}
    lines = 0
    while True:
        page = session.post(f"{url}/api/project/main/logs/poll", json=body, timeout=30).json()
        data = b"".join(base64.b64decode(message["message"]) for message in page["logs"])
        lines += len(data.decode(errors="replace").split("\r\n")) - 1
        if page["next_token"] is None:
            return lines
        body["next_token"] = page["next_token"]


def sync_lines(url: str) -> int:
    """Read the lines of ``run.follow()``."""
    with Client(server_url=url, project_name="main", user_token=Stub.token) as client:
        run = client.runs.get("speaker")
        assert run is not None  # noqa: S101 - the stub has it
        return sum(len(event.lines) for event in run.follow() if isinstance(event, LogLines))


def sync_records(url: str) -> int:
    """Read the lines as a workflow engine that logs them does: in records, with secrets masked."""
    with Client(server_url=url, project_name="main", user_token=Stub.token) as client:
        run = client.runs.get("speaker")
        assert run is not None  # noqa: S101
        secrets = collect_secrets(env=ENV, others=[Stub.token])
        relay = LogRelay(secrets=secrets, limits=RecordLimits(few_lines=32), log_budget_bytes=None)
        return sum(
            text.count("\n") + 1
            for event in run.follow()
            if isinstance(event, LogLines)
            for _, text in relay.records(event)
        )


def sync_bytes(url: str) -> int:
    """Read the bytes of ``run.logs()``."""
    with Client(server_url=url, project_name="main", user_token=Stub.token) as client:
        run = client.runs.get("speaker")
        assert run is not None  # noqa: S101
        return sum(chunk.count(b"\n") for chunk in run.logs())


def async_lines(url: str, kind: type[AsyncClient] = AsyncClient) -> int:
    """Read the lines of the async ``run.follow()``."""

    async def read() -> int:
        async with kind(server_url=url, project_name="main", user_token=Stub.token) as client:
            run = await client.runs.get("speaker")
            assert run is not None  # noqa: S101
            lines = 0
            async for event in run.follow():
                if isinstance(event, LogLines):
                    lines += len(event.lines)
            return lines

    return asyncio.run(read())


def bare_async(url: str) -> int:
    """Fetch and decode the log like ``bare``, with ``httpx``, which the async client uses."""

    async def read() -> int:
        body: dict[str, object] = {"run_name": "speaker", "job_submission_id": "sub-speaker", "limit": 1000}
        lines = 0
        async with httpx.AsyncClient() as client:
            while True:
                reply = await client.post(f"{url}/api/project/main/logs/poll", json=body)
                page = reply.json()
                data = b"".join(base64.b64decode(message["message"]) for message in page["logs"])
                lines += len(data.decode(errors="replace").split("\r\n")) - 1
                if page["next_token"] is None:
                    return lines
                body["next_token"] = page["next_token"]

    return asyncio.run(read())


def shared_lines(url: str) -> int:
    """Read the lines as a trigger does."""
    return async_lines(url, SharedAsyncClient)


WAYS: dict[str, Callable[[str], int]] = {
    "bare requests": bare,
    "bare httpx": bare_async,
    "sync follow()": sync_lines,
    "sync follow(), in records": sync_records,
    "sync logs()": sync_bytes,
    "async follow()": async_lines,
    "shared async follow()": shared_lines,
}


def measure_log(log: Log, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median wall and CPU seconds of each way; the ways take turns."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with Stub(lines=log.lines, line_bytes=log.line_bytes, lines_a_message=log.lines_a_message) as stub:
        for number in range(rounds + 1):
            for name, way in WAYS.items():
                gc.collect()
                wall, cpu = time.perf_counter(), time.process_time()
                found = way(stub.url)
                took = (time.perf_counter() - wall, time.process_time() - cpu)
                if found != log.lines:
                    raise RuntimeError(f"{name} read {found} of {log.lines} lines")
                # The first round loads modules and warms caches.
                if number:
                    spent[name].append(took)
    return {
        name: (statistics.median(wall for wall, _ in took), statistics.median(cpu for _, cpu in took))
        for name, took in spent.items()
    }


def measure(quick: bool) -> Section:
    """Measure a log of small messages and one of large messages."""
    section = Section("Log relay")
    size, rounds = (40_000, 3) if quick else (200_000, 7)
    logs = [Log("one line per message", size, 100, 1), Log("40 lines per message", size * 4, 100, 40)]
    lines = []
    for log in logs:
        spent = measure_log(log, rounds)
        base_wall, base_cpu = spent["bare requests"]
        for name, (wall, cpu) in spent.items():
            lines.append(
                [
                    log.name,
                    name,
                    f"{log.lines / wall:,.0f}",
                    f"{log.megabytes / wall:.1f}",
                    f"{cpu / log.megabytes * 1000:.1f}",
                    f"{base_wall / wall:.0%}",
                    f"{base_cpu / cpu:.0%}",
                ]
            )
            # Packing and masking is work that a bare reader does not do: the table shows what it adds.
            if name.startswith("bare") or name.endswith("in records"):
                continue
            section.rows.append(
                Row(
                    f"log relay, {name}, {log.name}",
                    f"{log.lines / wall:,.0f} lines/s, {log.megabytes / wall:.1f} MB/s",
                    f"bare `requests`: {log.lines / base_wall:,.0f} lines/s, {log.megabytes / base_wall:.1f} MB/s",
                    f"{base_wall / wall:.0%}",
                    "at least 80%",
                    base_wall / wall >= SHARE,
                )
            )
    section.notes.append(
        "The ways take turns; the figures are medians. The async ways use `httpx`, which takes more CPU per request "
        "and byte than `requests`; `bare httpx` in the table is their upper limit."
    )
    head = ["log", "way", "lines/s", "MB/s", "CPU ms per MB", "of bare (time)", "of bare (CPU)"]
    section.tables.append(
        Table(
            f"{size:,} lines of 100 bytes ({size * 4:,} at 40 lines per message), pages of 1,000 messages",
            head,
            lines,
        )
    )
    return section


if __name__ == "__main__":
    cli(measure)
