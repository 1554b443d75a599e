"""A proxy that injects one fault at one request, or from that request on.

Each request that arrives has a number, counted over all connections. At number ``step`` the proxy misbehaves;
all other requests are forwarded. Three faults need more than a broken reply:

* A refused connection: the listener is closed, and must be opened again once a connection was refused. A process
  cannot observe connections to a closed port, but the clients run in this process. So an audit hook of Python
  reports each ``socket.connect``: at the second attempt the first one has certainly been refused.
* A restart: the listener is closed for a moment, and all other connections are cut.
* A killed client: the process at the other end of the connection is found and killed (`killing`). If it was not
  found, the fault does not count.

The proxy also opens the gate of the run (`life`), after the reply of request ``gate_at`` was fetched: the poll that
the client has just sent must not see the end of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import h11
import httpx

from tests.faults.faults import KILLS, REFUSED_SECONDS, RESTART_SECONDS, Fault
from tests.faults.killing import kill_client
from tests.faults.loop import Loop
from tests.faults.raw_http import endpoint, head, next_request, write

Answer = tuple[int, bytes]
Forward = Callable[[bytes], Awaitable[Answer]]
# Arguments: the request's number, target and body, and a function that carries it out. Result: the client's reply.
Between = Callable[[int, str, bytes, Forward], Awaitable[Answer]]

_ATTEMPTS: dict[int, Callable[[], None]] = {}


def _on_audit_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and _ATTEMPTS and isinstance(arguments[1], tuple):
        attempted = _ATTEMPTS.get(arguments[1][1])
        if attempted is not None:
            attempted()


sys.addaudithook(_on_audit_event)


@dataclass
class Served:
    """The paths that were requested from the proxy, and the number of injected faults."""

    paths: list[str] = field(default_factory=list)
    faults: int = 0


class FaultProxy:
    """A proxy in front of ``upstream`` that injects ``fault`` at request ``step`` (from 1), or ``forever`` from there.

    ``gate`` is a named pipe that a job of the run reads from; it is opened once ``gate_at`` requests arrived.
    ``between`` may change every request and every reply.
    """

    def __init__(
        self,
        loop: Loop,
        upstream: str,
        fault: Fault | None = None,
        step: int = 0,
        *,
        forever: bool = False,
        gate: Path | None = None,
        gate_at: int = 0,
        between: Between | None = None,
    ) -> None:
        self.served = Served()
        self._loop = loop
        self._upstream = upstream
        self._fault = fault
        self._step = step
        self._for_ever = forever
        self._gate = gate
        self._gate_at = gate_at
        self._between = between
        self._port = 0
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._client: httpx.AsyncClient | None = None
        self._reopening: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._loop.do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.do(self._stop())

    async def _start(self) -> None:
        self._client = httpx.AsyncClient(base_url=self._upstream, timeout=30, trust_env=False)
        await self._listen()
        if self._is_at(1) and self._named("refuse the connection"):
            self._refuse()

    async def _stop(self) -> None:
        _ATTEMPTS.pop(self._port, None)
        if self._reopening is not None:
            self._reopening.cancel()
        if self._listener is not None:
            self._listener.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        assert self._client is not None
        await self._client.aclose()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._connected, "127.0.0.1", self._port, reuse_address=True
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    def _refuse(self) -> None:
        """Refuse connections until one has certainly been refused, or forever."""
        assert self._listener is not None
        self._listener.close()
        loop = asyncio.get_running_loop()
        attempts = itertools.count(1)

        def attempted() -> None:
            number = next(attempts)
            if number == 1:
                self.served.faults += 1
            # At the second attempt, the first one has been refused.
            elif number == 2 and not self._for_ever:
                loop.call_soon_threadsafe(self._open_soon, REFUSED_SECONDS)

        _ATTEMPTS[self._port] = attempted

    def _open_soon(self, seconds: float) -> None:
        _ATTEMPTS.pop(self._port, None)
        self._reopening = asyncio.get_running_loop().create_task(self._reopen(seconds))

    async def _reopen(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._listen()

    def _is_at(self, number: int) -> bool:
        return number == self._step or (self._for_ever and number >= self._step > 0)

    def _named(self, name: str) -> bool:
        return self._fault is not None and self._fault.name == name

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, h11.RemoteProtocolError, httpx.TransportError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while (asked := await next_request(connection, reader)) is not None:
            request, body = asked
            self.served.paths.append(endpoint(request.target.decode()))
            number = len(self.served.paths)
            if self._fault is not None and self._is_at(number) and not self._named("refuse the connection"):
                self.served.faults += 1
                self._open_gate_at(number)
                if not await self._misbehave(self._fault, number, request, body, writer):
                    return
            else:
                status, content = await self._answer(number, request, body)
                # Not before: the reply to this request must not contain the end, so that a life has two more requests.
                self._open_gate_at(number)
                closing = self._named("refuse the connection") and self._is_at(number + 1)
                if closing:
                    self._refuse()
                await write(writer, head(status, content, closing), content)
                if closing:
                    return
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.MUST_CLOSE:
                return
            connection.start_next_cycle()

    async def _misbehave(
        self, fault: Fault, number: int, request: h11.Request, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Inject the fault; return whether the connection stays usable."""
        true = (await self._answer(number, request, body))[1] if fault.carried_out else b""
        if fault.body is not None:
            await write(writer, head(fault.status, fault.body, False, fault.headers), fault.body)
            return True
        how: dict[str, Callable[[], Coroutine[Any, Any, bool]]] = {
            "cut in the middle of the reply": lambda: self._half(writer, true),
            "half a JSON": lambda: self._half_json(writer, true),
            "stall past the timeout": self._stall,
            "one byte a second": lambda: self._drip(writer, true),
            "server restarted in between": self._restart,
            **{kill.name: lambda: self._kill(writer) for kill in KILLS},
        }
        if fault.name in how and await how[fault.name]():
            return True
        writer.transport.abort()
        return False

    async def _half(self, writer: asyncio.StreamWriter, true: bytes) -> bool:
        await write(writer, head(200, true, False), true[: len(true) // 2])
        return False

    async def _half_json(self, writer: asyncio.StreamWriter, true: bytes) -> bool:
        half = true[: len(true) // 2]
        await write(writer, head(200, half, False), half)
        return True

    async def _stall(self) -> bool:
        await asyncio.sleep(2)
        return False

    async def _drip(self, writer: asyncio.StreamWriter, true: bytes) -> bool:
        await write(writer, head(200, true, False), b"")
        for byte in true or b" ":
            await write(writer, b"", bytes([byte]))
            await asyncio.sleep(1)
        return False

    async def _restart(self) -> bool:
        me = asyncio.current_task()
        assert self._listener is not None
        self._listener.close()
        if not self._for_ever:
            self._open_soon(RESTART_SECONDS)
        for task in self._connections - {me}:
            task.cancel()
        return False

    async def _kill(self, writer: asyncio.StreamWriter) -> bool:
        ends = [writer.get_extra_info(name) for name in ("peername", "sockname")]
        try:
            await asyncio.to_thread(kill_client, *ends)
        except RuntimeError:
            # No process was killed, so the fault does not count.
            self.served.faults -= 1
        return False

    async def _answer(self, number: int, request: h11.Request, body: bytes) -> Answer:
        if self._between is None:
            return await self._forward(request, body)
        return await self._between(
            number, request.target.decode(), body, lambda asked: self._forward(request, asked)
        )

    async def _forward(self, request: h11.Request, body: bytes) -> Answer:
        assert self._client is not None
        kept = [
            (name.decode(), value.decode())
            for name, value in request.headers
            if name not in (b"host", b"connection", b"content-length", b"transfer-encoding")
        ]
        reply = await self._client.request(
            request.method.decode(), request.target.decode(), content=body, headers=kept
        )
        return reply.status_code, reply.content

    def _open_gate_at(self, number: int) -> None:
        if self._gate is not None and number >= self._gate_at:
            # Opening fails as long as no job reads; a later request tries again.
            with contextlib.suppress(OSError):
                os.close(os.open(self._gate, os.O_WRONLY | os.O_NONBLOCK))
