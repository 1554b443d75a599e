"""Send the requests of many clients through one set of connections, and their polls together.

The problem: a triggerer has a client for each deferred task. Thousands of clients with connections and polls
of their own are too much for the server and for the process.

The idea: clients of one event loop with equal settings (server, token, limits) share a ``_Hub``: one
transport, one ``BatchedPolls`` for each project, one ``PauseGuard``. A poll gets its reply from a page if
there is one, else it is sent alone. The clients know nothing of each other.

Invariants: the last client to leave closes the connections. No reply is older than the call it answers. Polls
that are sent alone, and log reads, never take all connections, so pages do not wait behind them. A caller
with a time limit of its own is never made to wait for others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from functools import cache

from dstack_core import clock
from dstack_core._flow.steps import Wait
from dstack_core._shared.batched_polls import BatchedPolls
from dstack_core._shared.process_pause import PauseGuard
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.http_messages import Reply, Request
from dstack_core._wire.lookups import Lookup, is_log_read, lookup_of

# How many log reads, and how many other requests, are under way at once: 18 of the 20 connections, so that
# the pages of polls never wait behind thousands of them. With more they would, and httpx's own queue gets
# slow when it is long; with fewer, a burst of log reads takes longer.
_LANE = 9


class SharedTransport(AsyncTransport):
    """A transport that shares its connections with all of its settings in this event loop."""

    def __init__(self, settings: TransportSettings) -> None:
        super().__init__(settings)
        self._hub: _Hub | None = None

    async def __call__(self, request: Request) -> Reply:
        """Return the reply; the reply to a poll is at most as old as the call."""
        return await self._joined().send(request)

    def wait(self, step: Wait) -> Awaitable[Reply]:
        """Return the reply to the poll that ended the wait."""
        return self._joined().wait(step)

    async def close(self) -> None:
        """Leave the others; the last one to leave closes the connections."""
        hub, self._hub = self._hub, None
        if hub is not None:
            await _hubs().leave(hub)

    def _joined(self) -> _Hub:
        if self._hub is None:
            self._hub = _hubs().join(self._settings)
        return self._hub


class _Hub:
    """The connections and the batched polls of one server and token in one event loop."""

    def __init__(self, settings: TransportSettings) -> None:
        self.members = 0
        self._server_url = settings.server_url
        self._transport = AsyncTransport(settings)
        self._polls: dict[str, BatchedPolls] = {}
        self._log_reads, self._others = asyncio.Semaphore(_LANE), asyncio.Semaphore(_LANE)
        self._pause = PauseGuard()
        self._pause.start()

    async def send(self, request: Request) -> Reply:
        # A caller with a time limit of its own cannot wait for a page that many share.
        lookup = None if request.timeout is not None else lookup_of(request)
        reply = None if lookup is None else await self._polls_of(lookup).poll(lookup).answer
        return await self._held(reply, request)

    async def wait(self, step: Wait) -> Reply:
        request = step.poll.request
        lookup = lookup_of(request)
        # Not a poll that a page can answer: an interval, then the request.
        if lookup is None:
            await clock.asleep(min(step.interval, step.due))
            return await self._held(None, request)
        return await self._held(await self._polls_of(lookup).wait(lookup, step).answer, request)

    async def close(self) -> None:
        self._pause.stop()
        for polls in self._polls.values():
            polls.close()
        await self._transport.close()

    def _polls_of(self, lookup: Lookup) -> BatchedPolls:
        polls = self._polls.get(lookup.project)
        if polls is None:
            polls = BatchedPolls(self._transport, self._server_url, lookup.project)
            self._polls[lookup.project] = polls
        return polls

    async def _held(self, reply: Reply | None, request: Request) -> Reply:
        """Return ``reply``, else the reply to ``request`` alone; later if this process just stood still."""
        if reply is None:
            async with self._log_reads if is_log_read(request) else self._others:
                reply = await self._transport(request)
        await self._pause.hold()
        return reply


class _Hubs:
    """The hubs of this process by event loop and settings; safe for loops in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[asyncio.AbstractEventLoop, TransportSettings], _Hub] = {}

    def join(self, settings: TransportSettings) -> _Hub:
        """Return the running loop's hub for these settings and count one member more."""
        key = (asyncio.get_running_loop(), settings)
        with self._lock:
            # A loop that ended with clients open would stay in memory for as long as the process.
            self._known = {known: hub for known, hub in self._known.items() if not known[0].is_closed()}
            if key not in self._known:
                self._known[key] = _Hub(settings)
            hub = self._known[key]
            hub.members += 1
            return hub

    async def leave(self, hub: _Hub) -> None:
        """Count one member less; without any the hub is closed."""
        with self._lock:
            hub.members -= 1
            if hub.members:
                return
            # Out of the table before it is closed: a client that joins meanwhile gets a new one.
            self._known = {key: known for key, known in self._known.items() if known is not hub}
        await hub.close()


@cache
def _hubs() -> _Hubs:
    """Return this process's hubs, made when the first client needs one."""
    return _Hubs()
