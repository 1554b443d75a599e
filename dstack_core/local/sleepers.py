"""The waits of jobs in virtual time: the server's side of ``job_sleep``."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from dstack_core import clock
from dstack_core.local import job_sleep


class Sleepers:
    """The ``sleep`` commands of jobs, and the work of each job; use it in the server's event loop."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folder = directory
        self._starting = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._works: dict[str, clock.Work] = {}
        self._connections: set[asyncio.Task[None]] = set()

    def started(self, submission_id: str, work: clock.Work) -> None:
        """Record the work of a job."""
        self._works[submission_id] = work

    def ended(self, submission_id: str) -> None:
        """Forget the work of a job."""
        self._works.pop(submission_id, None)

    async def environment(self, submission_id: str, path: str) -> dict[str, str]:
        """Return the variables of a job that sleeps in virtual time; none while time is real."""
        if not clock.is_virtual():
            return {}
        async with self._starting:
            if self._server is None:
                self._folder = await asyncio.to_thread(job_sleep.install, self._directory)
                self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return {"PATH": f"{self._folder}:{path}", job_sleep.PORT: f"{port}/{submission_id}"}

    async def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio starts a task for each connection
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, ValueError):
                job, _, seconds = (await reader.readline()).decode().strip().partition(" ")
                await self._wait(reader, self._works.get(job), float(seconds))
                writer.write(b"\n")
                await writer.drain()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _wait(self, reader: asyncio.StreamReader, work: clock.Work | None, seconds: float) -> None:
        if work is None:
            return
        # A command that is killed closes its connection, and no longer waits.
        gone = asyncio.create_task(reader.read(1))
        woken = asyncio.create_task(clock.asleep(seconds, caller=False))
        work.pause()
        try:
            await asyncio.wait({gone, woken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.resume()
            for task in (gone, woken):
                task.cancel()
            await asyncio.gather(gone, woken, return_exceptions=True)


def timer(seconds: float | None) -> asyncio.Task[None]:
    """Return a task that ends after some seconds of the server's time; None: never."""
    return asyncio.create_task(_pass(seconds))


async def _pass(seconds: float | None) -> None:
    if seconds is None:
        await asyncio.Event().wait()
    else:
        await clock.asleep(seconds, caller=False)
