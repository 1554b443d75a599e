"""The middleware around the application: it records each request and injects the faults of `faults`.

For each request, in this order: record it; wait for the latency; wait for the fault's delay; carry the
request out if the fault requires it; then close the connection, send the fault's reply, or let the
application answer.

The body of a delayed request is read before the wait. A slow server carries a request out although its client
has given up meanwhile, and clients must cope with that; if the body were not read ahead, the application
would find the connection closed and do nothing. A dropped connection is aborted on the socket, and the call
then waits until uvicorn reports the disconnect: returning without a reply while the connection is open would
make uvicorn answer 500.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dstack_core import clock
from dstack_core.local.faults import Fault, Faults

# Bounded, so that a server that runs for days does not keep growing: 100,000 requests are some 20 MB. Older
# ones are dropped from the record.
_REMEMBERED = 100_000


class RecordedRequest(NamedTuple):
    """A request that the server received; `time` is `dstack_core.clock.monotonic()`, in seconds."""

    method: str
    path: str
    time: float


class FaultMiddleware:
    """An ASGI application around another one, which records requests and injects faults."""

    def __init__(self, app: ASGIApp, faults: Faults, hang_up: Callable[[Any], None]) -> None:
        self._app = app
        self._faults = faults
        self._hang_up = hang_up
        self._closing = asyncio.Event()
        self.requests: deque[RecordedRequest] = deque(maxlen=_REMEMBERED)

    def close(self) -> None:
        """End the delays of the requests in progress."""
        self._closing.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.requests.append(RecordedRequest(scope["method"], scope["path"], clock.monotonic()))
        # A request is work, except for its delays (``_wait``).
        with clock.Work() as work:
            await self._respond(work, scope, receive, send)

    async def _respond(self, work: clock.Work, scope: Scope, receive: Receive, send: Send) -> None:
        latency = self._faults.latency(scope["path"])
        fault = self._faults.take(scope["path"])
        if latency or (fault is not None and fault.delay):
            receive = await _read_ahead(receive)
        await self._wait(work, latency)
        if fault is None:
            await self._app(scope, receive, send)
            return
        try:
            await self._answer(fault, work, scope, receive, send)
        finally:
            fault.answered.set()

    async def _answer(
        self, fault: Fault, work: clock.Work, scope: Scope, receive: Receive, send: Send
    ) -> None:
        await self._wait(work, fault.delay)
        if fault.drop == "after" or fault.carry_out:
            await self._app(scope, receive, _nowhere)
        if fault.drop is not None:
            self._hang_up(scope["client"])
            # Uvicorn would answer 500 if this returned without a reply while the connection is open.
            while (await receive())["type"] != "http.disconnect":
                continue
        elif fault.status is not None:
            await _reply(fault)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _wait(self, work: clock.Work, seconds: float) -> None:
        if seconds > 0:
            work.pause()
            try:
                # The client waits for this reply, and so for this time.
                await clock.await_event(self._closing, seconds)
            finally:
                work.resume()


async def _read_ahead(receive: Receive) -> Receive:
    """Read the whole body now: a slow server carries a request out even if its client has given up."""
    messages: deque[Message] = deque()
    while True:
        messages.append(await receive())
        if not messages[-1].get("more_body"):
            break

    async def replay() -> Message:
        return messages.popleft() if messages else await receive()

    return replay


async def _nowhere(message: Message) -> None:
    return


def _reply(fault: Fault) -> Response:
    status = fault.status or 500
    if isinstance(fault.body, str):
        return PlainTextResponse(fault.body, status, fault.headers)
    body = {"detail": "injected fault"} if fault.body is None else fault.body
    return JSONResponse(body, status, fault.headers)
