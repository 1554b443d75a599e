"""A run, as the async client sees it: the twin of ``run``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from types import TracebackType
from typing import Self

from dstack_core import _adrive
from dstack_core._base import RunBase
from dstack_core._flow.chunks import ChunkOptions, LogChunk
from dstack_core._shared.transport import SharedTransport
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core.errors import RunNotFoundError, WaitTimeoutError
from dstack_core.models.events import Event
from dstack_core.models.logs import LogBytes
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.records import EventRecord, Metric
from dstack_core.models.statuses import RunStatus


class AsyncRun(RunBase[AsyncTransport]):
    """Watch and stop one run. Get it from ``AsyncClient.runs``; its attributes are as of the last look."""

    async def status(self) -> RunStatus:
        """Ask the server for the run's status. Raises the server errors."""
        return (await self.refresh())._snapshot.status

    async def refresh(self) -> Self:
        """Look again. Raises ``RunNotFoundError`` when the run was deleted, and the server errors."""
        snapshot = await _adrive.arun(self._session.get(self.name, self.id), self._transport)
        if snapshot is None:
            raise RunNotFoundError(f"the run {self.name} is gone: {self.url}")
        self._snapshot = snapshot
        return self

    async def logs(
        self,
        start_time: datetime | None = None,
        follow: bool = False,
        poll_interval: float = 5.0,
        *,
        diagnose: bool = False,
        node: int | None = None,
    ) -> AsyncGenerator[LogBytes, None]:
        """Yield the log as bytes: the twin of ``Run.logs``."""
        options = ChunkOptions(start_time, follow, poll_interval, diagnose, node)
        flow = self._chunks(options)
        async for event in _adrive.aiterate(flow, self._transport):
            if isinstance(event, LogChunk):
                yield event.data

    def follow(
        self,
        progress: Progress | None = None,
        *,
        poll_interval: float = 5.0,
        logs: bool = True,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Yield the run's events until it is finished; the last is ``RunFinished`` with the ``Outcome``.

        ``progress`` (from any earlier event) goes on right behind that event. ``poll_interval`` and
        ``retry_budget`` in seconds; a server that is silent for longer raises ``ServerUnreachableError``,
        the run goes on. ``sleep`` (a function of seconds) replaces ``asyncio.sleep``; with it every look
        wakes this follower, also with a ``SharedAsyncClient``. Leaving the iteration does not stop the run.
        The status is looked at every time, a log that stays silent less and less often, at most 15 seconds
        apart (a minute with a ``SharedAsyncClient``). Raises ``RunNotFoundError`` and the server errors.
        """
        flow = self._session.follow(
            progress or Progress(self.name, self.id),
            poll_interval=poll_interval,
            logs=logs,
            retry_budget=retry_budget,
        )
        together = self._transport if isinstance(self._transport, SharedTransport) else None
        rest = together.rest if together is not None and sleep is None else None
        return _adrive.aiterate(flow, self._transport, sleep or asyncio.sleep, rest)

    async def wait(self, timeout: float | None = None, *, poll_interval: float = 5.0) -> Outcome:
        """Wait until the run is finished and return its ``Outcome``: the twin of ``Run.wait``."""
        flow = self._session.follow(
            Progress(self.name, self.id), poll_interval=poll_interval, logs=False, retry_budget=600.0
        )
        return await _adrive.arun(flow, self._transport, self._until(timeout, "was not over"))

    async def attach(
        self,
        ssh_identity_file: str | os.PathLike[str] | None = None,
        *,
        node: int = 0,
        timeout: float | None = None,
        poll_interval: float = 5.0,
    ) -> Self:
        """Wait until the run has started, log in to its container and forward its ports; return the run.

        The twin of ``Run.attach``, with its parameters and errors: ``async with await run.attach():``.
        Waiting, logging in and reading live logs happen in threads; cancelling closes what was opened.
        """
        if self._attachment is None:
            flow = self._session.attach(
                self.name, self.id, identity_file=ssh_identity_file, node=node, poll_interval=poll_interval
            )
            sleep = self._until(timeout, "had not started")
            self._snapshot, self._attachment = await _adrive.arun(flow, self._transport, sleep)
            self._attach_asked = True
        return self

    async def detach(self) -> None:
        """Close the SSH tunnel and the local ports: the twin of ``Run.detach``."""
        attachment, self._attachment, self._attach_asked = self._attachment, None, False
        if attachment is not None:
            await asyncio.to_thread(attachment.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.detach()

    async def wait_until_ready(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> str:
        """Wait until the service answers and return its address: the twin of ``Run.wait_until_ready``."""
        flow = self._session.wait_until_ready(
            self.name, self.id, poll_interval=poll_interval, retry_budget=retry_budget
        )
        return await _adrive.arun(
            flow, self._transport, self._until(timeout, "was not ready", sleep or asyncio.sleep)
        )

    async def events(self, limit: int | None = None) -> list[EventRecord]:
        """Return what the server recorded of the run: the twin of ``Run.events``."""
        return await _adrive.arun(self._session.events(self.id, limit), self._transport)

    async def metrics(self, node: int = 0, replica: int = 0, limit: int | None = None) -> list[Metric]:
        """Return what one job used of its machine: the twin of ``Run.metrics``."""
        flow = self._session.metrics(self.name, self.id, node=node, replica=replica, limit=limit)
        return await _adrive.arun(flow, self._transport)

    async def stop(self, abort: bool = False, *, insist_for: float = 0.0) -> None:
        """Ask the server to stop the run: the twin of ``Run.stop``."""
        flow = self._session.stop(self.name, self.id, abort=abort, insist_for=insist_for)
        await _adrive.arun(flow, self._transport)

    def _until(
        self, timeout: float | None, what: str, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> Callable[[float], Awaitable[None]]:
        """Return ``sleep``, made to end with ``WaitTimeoutError`` once ``timeout`` (seconds) is over."""
        if timeout is None:
            return sleep
        deadline = time.monotonic() + timeout

        async def sleep_in_time(seconds: float) -> None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(f"run {self.name} {what} after {timeout:g} s; it goes on: {self.url}")
            await sleep(min(seconds, left))

        return sleep_in_time
