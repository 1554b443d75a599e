"""Share connections and status reads between the clients of one event loop.

A flow asks for its run with one ``runs/get`` a look. Here the looks that are asked for within a moment are
answered from the same pages of ``runs/list``, 100 active runs each; the flow does not notice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from functools import cache
from typing import Any

from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.lookups import ActivePage, Lookup, active_page, is_log_read, lookup_of
from dstack_core._wire.plain import Reply, Request
from dstack_core.errors import DstackError, TransientServerError

# How long a round waits for looks, again as long as more come; those of many flows are spread a bit.
GATHER_SECONDS = 0.1
_LONGEST_GATHERING = 12
# So many reads of logs, and so many other requests, are under way at once: the pages of looks shall not have
# to wait behind thousands of them, and httpx's own queue gets slow when it is long.
_LANE = 9
# A page costs a server about as much as this many single looks, so it must save more.
PAGE_WORTH = 4
# So long a run counts as watched. Where fewer than PAGE_WORTH are, rounds wait for no others.
_REMEMBERED_SECONDS = 300.0

_Send = Callable[[Request], Awaitable[Reply]]
_Waiting = dict[Lookup, list["asyncio.Future[Reply | None]"]]


class SharedTransport(AsyncTransport):
    """Send requests through what all transports with the same settings in this event loop share."""

    def __init__(self, settings: TransportSettings) -> None:
        super().__init__(settings)
        self._hub: _Hub | None = None

    async def __call__(self, request: Request) -> Reply:
        """Return the reply; one to a look is at most as old as the call."""
        if self._hub is None:
            self._hub = _hubs().join(self._settings)
        return await self._hub.send(request)

    async def close(self) -> None:
        """Leave; the last one to leave closes the connections."""
        hub, self._hub = self._hub, None
        if hub is not None:
            await _hubs().leave(hub)


class _Hub:
    """Hold the connections and the boards of one server and token in one event loop."""

    def __init__(self, settings: TransportSettings) -> None:
        self.members = 0
        self._server_url = settings.server_url
        self._transport = AsyncTransport(settings)
        self._boards: dict[str, Board] = {}
        self._log_reads, self._others = asyncio.Semaphore(_LANE), asyncio.Semaphore(_LANE)

    async def send(self, request: Request) -> Reply:
        lookup = lookup_of(request)
        if lookup is not None:
            board = self._boards.get(lookup.project)
            if board is None:
                board = Board(self._transport, self._server_url, lookup.project)
                self._boards[lookup.project] = board
            answer = await board.look(lookup)
            if answer is not None:
                return answer
        async with self._log_reads if is_log_read(request) else self._others:
            return await self._transport(request)

    async def close(self) -> None:
        for board in self._boards.values():
            board.close()
        await self._transport.close()


class Board:
    """Gather the looks at one project's runs and answer each round of them together.

    A look is answered from requests that were sent after it was asked for: one that comes while a round
    is under way waits for the next.
    """

    def __init__(self, send: _Send, server_url: str, project: str) -> None:
        self._send = send
        self._server_url = server_url
        self._project = project
        self._waiting: _Waiting = {}
        self._rounds: asyncio.Task[None] | None = None
        self._last_looks: dict[Lookup, float] = {}

    async def look(self, lookup: Lookup) -> Reply | None:
        """Return the reply, or None when the run must be asked for alone. Raises what a round meets."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply | None] = loop.create_future()
        self._waiting.setdefault(lookup, []).append(future)
        self._remember(lookup, loop.time())
        if self._rounds is None:
            # An empty context: the work is for all, so nothing of it belongs into the log of the first.
            self._rounds = loop.create_task(self._work(), context=Context())
        return await future

    def close(self) -> None:
        """Stop working; who still waits asks alone."""
        if self._rounds is not None:
            self._rounds.cancel()

    async def _work(self) -> None:
        waiting: _Waiting = {}
        try:
            while self._waiting:
                await self._gather()
                waiting, self._waiting = self._waiting, {}
                await self._round(waiting)
                _answer_all(waiting, None)
        finally:
            self._rounds = None
            for left in (waiting, self._waiting):
                _answer_all(left, None)
            self._waiting = {}

    def _remember(self, lookup: Lookup, now: float) -> None:
        """Keep the last few different looks, the newest last."""
        looks = self._last_looks
        looks.pop(lookup, None)
        looks[lookup] = now
        oldest = next(iter(looks))
        while len(looks) > PAGE_WORTH or looks[oldest] < now - _REMEMBERED_SECONDS:
            del looks[oldest]
            oldest = next(iter(looks))

    async def _gather(self) -> None:
        if len(self._last_looks) < PAGE_WORTH:
            return
        for _ in range(_LONGEST_GATHERING):
            before = len(self._waiting)
            await asyncio.sleep(GATHER_SECONDS)
            if len(self._waiting) == before:
                return

    async def _round(self, waiting: _Waiting) -> None:
        """Answer from pages as long as they are worth it; what is left over is asked for alone."""
        position: Mapping[str, Any] | None = None
        # The runs may be on the last pages: half of what the looks would cost alone may be spent in vain.
        worth = _number_of(waiting) // 2
        while _number_of(waiting) >= PAGE_WORTH:
            call = active_page(self._server_url, self._project, position)
            try:
                reply = await self._send(call.request)
            except TransientServerError as error:
                _fail_all(waiting, error)
                return
            try:
                page = call.parse(reply)
            except TransientServerError:
                # Each flow reads it for itself, and names its own run in the message.
                _answer_all(waiting, reply)
                return
            except DstackError:
                # An answer for one run tells better what is wrong.
                return
            worth += _hand_out(page, waiting) - PAGE_WORTH
            position = page.position
            if position is None or worth < 0:
                return


def _hand_out(page: ActivePage, waiting: _Waiting) -> int:
    found = 0
    for lookup in list(waiting):
        answer = page.answer(lookup)
        if answer is not None:
            found += 1
            _answer_all({lookup: waiting.pop(lookup)}, answer)
    return found


def _number_of(waiting: _Waiting) -> int:
    return sum(any(not future.done() for future in futures) for futures in waiting.values())


def _answer_all(waiting: _Waiting, reply: Reply | None) -> None:
    for future in (future for futures in waiting.values() for future in futures):
        if not future.done():
            future.set_result(reply)


def _fail_all(waiting: _Waiting, error: TransientServerError) -> None:
    for future in (future for futures in waiting.values() for future in futures):
        if not future.done():
            future.set_exception(TransientServerError(error.message, retry_after=error.retry_after))


class _Hubs:
    """Find the hub of an event loop and settings; safe for loops in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[asyncio.AbstractEventLoop, TransportSettings], _Hub] = {}

    def join(self, settings: TransportSettings) -> _Hub:
        """Return the running loop's hub for these settings and count one member more."""
        key = (asyncio.get_running_loop(), settings)
        with self._lock:
            # A loop that ended with clients open must not be kept for ever.
            self._known = {known: hub for known, hub in self._known.items() if not known[0].is_closed()}
            hub = self._known.setdefault(key, _Hub(settings))
            hub.members += 1
            return hub

    async def leave(self, hub: _Hub) -> None:
        """Count one member less; without any the hub is closed."""
        with self._lock:
            hub.members -= 1
            if hub.members:
                return
            self._known = {key: known for key, known in self._known.items() if known is not hub}
        await hub.close()


@cache
def _hubs() -> _Hubs:
    """Return this process's hubs, made when the first client needs one."""
    return _Hubs()
