"""A proxy that does one thing wrong at one request, or from that request on.

What comes from the client is parsed by h11; what goes back is written byte by byte where a fault needs that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import h11
import httpx

REFUSED_SECONDS = 0.08
RESTART_SECONDS = 0.4
_LOGIN = "https://login.example/sign-in?next=dstack"


@dataclass(frozen=True)
class Fault:
    """Name what goes wrong; the request is carried out where ``carried_out`` says so."""

    name: str
    carried_out: bool
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None


FAULTS = (
    Fault("refuse the connection", False),
    Fault("cut before the request", False),
    Fault("cut after the request (lost reply)", True),
    Fault("cut in the middle of the reply", True),
    Fault("429 with Retry-After", False, 429, (("retry-after", "1"),), b'{"detail": "slow down"}'),
    Fault("500 plain text", False, 500, (("content-type", "text/plain"),), b"Internal Server Error"),
    Fault("502 HTML", False, 502, (("content-type", "text/html"),), b"<html><h1>502 Bad Gateway</h1></html>"),
    Fault("503", False, 503, (), b"no healthy upstream"),
    Fault("empty body", True, 200, (), b""),
    Fault("half a JSON", True),
    Fault("JSON of the wrong shape", True, 200, (), b'{"unexpected": [1, 2, 3]}'),
    Fault("redirect to a login page", False, 302, (("location", _LOGIN),), b""),
    Fault("stall past the timeout", True),
    Fault("one byte a second", True),
    Fault("server restarted in between", True),
)


@dataclass
class Served:
    """Hold what one client of the proxy asked for, and what was done to it."""

    paths: list[str] = field(default_factory=list)
    faults: int = 0


class Loop:
    """Run the event loop of all proxies in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fault-proxies", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run ``work`` there and return its result."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(60)


class FaultProxy:
    """Forward to ``upstream``; at request number ``step`` (from 1) do ``fault``, ``for_ever`` or once.

    ``gate`` is a named pipe that a job of the run reads from: it is opened once ``gate_at`` requests came.
    """

    def __init__(
        self,
        loop: Loop,
        upstream: str,
        fault: Fault | None = None,
        step: int = 0,
        *,
        for_ever: bool = False,
        gate: Path | None = None,
        gate_at: int = 0,
    ) -> None:
        self.served = Served()
        self._loop = loop
        self._upstream = upstream
        self._fault = fault
        self._step = step
        self._for_ever = for_ever
        self._gate = gate
        self._gate_at = gate_at
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
            await self._close_the_door(REFUSED_SECONDS)

    async def _stop(self) -> None:
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

    async def _close_the_door(self, seconds: float) -> None:
        """Refuse connections for a while, or for ever."""
        assert self._listener is not None
        self._listener.close()
        self.served.faults += 1
        if not self._for_ever:
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
        while (asked := await _next_request(connection, reader)) is not None:
            request, body = asked
            self.served.paths.append(_endpoint(request.target.decode()))
            number = len(self.served.paths)
            if self._gate is not None and number >= self._gate_at:
                self._open_gate(self._gate)
            if self._fault is not None and self._is_at(number) and not self._named("refuse the connection"):
                self.served.faults += 1
                if not await self._misbehave(self._fault, request, body, writer):
                    return
            else:
                reply = await self._forward(request, body)
                closing = self._named("refuse the connection") and self._is_at(number + 1)
                if closing and self.served.faults == 0:
                    await self._close_the_door(REFUSED_SECONDS)
                await _write(writer, _head(reply.status_code, reply.content, closing), reply.content)
                if closing:
                    return
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()

    async def _misbehave(
        self, fault: Fault, request: h11.Request, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Do the fault; tell whether the connection can go on."""
        true = (await self._forward(request, body)).content if fault.carried_out else b""
        if fault.body is not None:
            await _write(writer, _head(fault.status, fault.body, False, fault.headers), fault.body)
            return True
        how: dict[str, Callable[[], Coroutine[Any, Any, bool]]] = {
            "cut in the middle of the reply": lambda: self._half(writer, true),
            "half a JSON": lambda: self._half_json(writer, true),
            "stall past the timeout": self._stall,
            "one byte a second": lambda: self._drip(writer, true),
            "server restarted in between": self._restart,
        }
        if fault.name in how and await how[fault.name]():
            return True
        writer.transport.abort()
        return False

    async def _half(self, writer: asyncio.StreamWriter, true: bytes) -> bool:
        await _write(writer, _head(200, true, False), true[: len(true) // 2])
        return False

    async def _half_json(self, writer: asyncio.StreamWriter, true: bytes) -> bool:
        half = true[: len(true) // 2]
        await _write(writer, _head(200, half, False), half)
        return True

    async def _stall(self) -> bool:
        await asyncio.sleep(2)
        return False

    async def _drip(self, writer: asyncio.StreamWriter, true: bytes) -> bool:
        await _write(writer, _head(200, true, False), b"")
        for byte in true or b" ":
            await _write(writer, b"", bytes([byte]))
            await asyncio.sleep(1)
        return False

    async def _restart(self) -> bool:
        me = asyncio.current_task()
        await self._close_the_door(RESTART_SECONDS)
        self.served.faults -= 1
        for task in self._connections - {me}:
            task.cancel()
        return False

    async def _forward(self, request: h11.Request, body: bytes) -> httpx.Response:
        assert self._client is not None
        kept = [
            (name.decode(), value.decode())
            for name, value in request.headers
            if name not in (b"host", b"connection", b"content-length", b"transfer-encoding")
        ]
        return await self._client.request(
            request.method.decode(), request.target.decode(), content=body, headers=kept
        )

    def _open_gate(self, gate: Path) -> None:
        # Without a reader, which may come later, this is refused.
        with contextlib.suppress(OSError):
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))


async def _next_request(
    connection: h11.Connection, reader: asyncio.StreamReader
) -> tuple[h11.Request, bytes] | None:
    request: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            return request, body
        else:
            return None


def _endpoint(target: str) -> str:
    return "/".join(target.partition("?")[0].split("/")[-2:])


def _head(status: int, body: bytes, close: bool, headers: tuple[tuple[str, str], ...] = ()) -> bytes:
    lines = [f"HTTP/1.1 {status} -", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if not any(name == "content-type" for name, _ in headers):
        lines.append("content-type: application/json")
    if close:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


async def _write(writer: asyncio.StreamWriter, *parts: bytes) -> None:
    writer.write(b"".join(parts))
    await writer.drain()
