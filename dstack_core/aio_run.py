"""A run, as the async client sees it: the twin of ``run``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from types import TracebackType
from typing import Literal, Self

from dstack_core import _adrive
from dstack_core._base import RunBase
from dstack_core._flow.raw_log import ChunkOptions, LogChunk
from dstack_core._flow.retry import within
from dstack_core._shared.transport import SharedTransport
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import Event
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.records import EventRecord, LogBytes, Metric
from dstack_core.models.statuses import RunStatus
from dstack_core.models.stops import StopResult


class AsyncRun(RunBase[AsyncTransport]):
    """A handle to one run, from ``AsyncClient.runs``; its attributes are as of the last poll."""

    async def status(self) -> RunStatus:
        """Ask the server for the run's status. Raises the server errors."""
        return (await self.refresh())._snapshot.status

    async def refresh(self) -> Self:
        """Fetch the run. Raises ``RunNotFoundError`` when the run was deleted, and the server errors."""
        snapshot = await _adrive.arun(self._operations.get(self.name, self.id), self._transport)
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
        timeout: float | None = None,
        poll_interval: float = 5.0,
        logs: bool = True,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Yield the run's events until it is finished; the last is ``RunFinished`` with the ``Outcome``.

        ``progress`` (from any earlier event) goes on right behind that event. ``poll_interval`` and
        ``retry_budget`` in seconds; a server that is silent for longer raises ``ServerUnreachableError``,
        the run keeps running. ``timeout`` (seconds) bounds everything, requests included, and raises
        ``WaitTimeoutError``. ``sleep`` (a function of seconds) replaces ``asyncio.sleep``; with it a
        ``SharedAsyncClient`` polls whenever a sleep has ended. Leaving the iteration does not stop the run.
        The status is looked at every time, a log that stays silent less and less often, at most 15 seconds
        apart (a minute with a ``SharedAsyncClient``). Raises ``RunNotFoundError`` and the server errors.
        """
        flow = self._follow(
            progress,
            timeout=timeout,
            poll_interval=poll_interval,
            logs=logs,
            retry_budget=retry_budget,
            sleep=sleep,
        )
        return _adrive.aiterate(flow, self._transport, sleep or asyncio.sleep, self._waits(sleep))

    async def wait(
        self,
        timeout: float | None = None,
        *,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Outcome:
        """Wait until the run has finished and return its ``Outcome``: the twin of ``Run.wait``."""
        flow = self._follow(None, poll_interval=poll_interval, logs=False, retry_budget=retry_budget)
        limited = within(flow, self._limit(timeout, "had not finished"))
        return await _adrive.arun(limited, self._transport, sleep, on_event, self._waits(sleep))

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
            flow = self._operations.attach(
                self.name, self.id, identity_file=ssh_identity_file, node=node, poll_interval=poll_interval
            )
            limited = within(flow, self._limit(timeout, "had not started"))
            self._snapshot, self._attachment = await _adrive.arun(limited, self._transport)
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
        flow = self._operations.wait_until_ready(
            self.name, self.id, poll_interval=poll_interval, retry_budget=retry_budget
        )
        limited = within(flow, self._limit(timeout, "was not ready"))
        return await _adrive.arun(limited, self._transport, sleep)

    async def events(self, limit: int | None = None) -> list[EventRecord]:
        """Return what the server recorded of the run: the twin of ``Run.events``."""
        return await _adrive.arun(self._operations.events(self.id, limit), self._transport)

    async def metrics(self, node: int = 0, replica: int = 0, limit: int | None = None) -> list[Metric]:
        """Return what one job used of its machine: the twin of ``Run.metrics``."""
        flow = self._operations.metrics(self.name, self.id, node=node, replica=replica, limit=limit)
        return await _adrive.arun(flow, self._transport)

    async def stop(
        self,
        abort: bool = False,
        *,
        until: Literal["accepted", "stopping", "ended"] = "accepted",
        timeout: float | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> StopResult:
        """Stop the run and return what is known of it: the twin of ``Run.stop``."""
        flow = self._operations.stop(self._target, abort, until, timeout, self._check)
        return await _adrive.arun(flow, self._transport, sleep)

    def _waits(self, sleep: object) -> _adrive.AsyncWait | None:
        """Return what carries out waits together with others; None to wait alone."""
        shared = self._transport if isinstance(self._transport, SharedTransport) else None
        return shared.wait if shared is not None and sleep is None else None

    def _on_poll(self) -> Callable[[RunSnapshot], None] | None:
        # Thousands of handles that each keep what a poll showed would be most of what their process keeps.
        return None if isinstance(self._transport, SharedTransport) else super()._on_poll()
