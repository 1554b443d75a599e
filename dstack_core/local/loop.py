"""Uvicorn without its effects on the process (logging, signal handlers), and with a callback when ready."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

# Requests in progress get 5 s when the server stops; a request to a service may take longer and is cut off.
_LOOKS, _LOOK_SECONDS = 1000, 0.005


class QuietProtocol(H11Protocol):
    """An HTTP protocol without an access log, whatever handlers the process has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.access_log = False


class QuietConfig(uvicorn.Config):
    """A configuration that does not change the process's logging: other servers may share its loggers."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            app,
            http=QuietProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
        )

    def configure_logging(self) -> None:
        """Do nothing."""


class ReadyServer(uvicorn.Server):
    """A server that calls back when it answers requests and when it begins to stop, and that stops at once.

    Uvicorn looks ten times a second whether it is to stop, and sleeps as long again while it stops: 0.15 s
    for each server, of which a test suite starts thousands.
    """

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], on_exit: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_exit = on_exit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_to_stop = asyncio.Event()

    def stop(self) -> None:
        """Let the server stop; may be called in any thread, and before it serves."""
        self.should_exit = True
        if self._loop is not None:
            # The loop may have ended by itself.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._asked_to_stop.set)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call ``on_ready``."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    async def main_loop(self) -> None:
        """Serve until ``stop`` is called; once a second, update the date header of replies."""
        # on_tick does so in every tenth call.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked_to_stop.wait(), 1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call ``on_exit`` and stop at the same time, because it ends the requests that a fault delays."""
        await asyncio.gather(self._shut_down(sockets or []), self._on_exit())

    async def _shut_down(self, sockets: list[socket.socket]) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        for _ in range(_LOOKS):
            if not self.server_state.connections and not self.server_state.tasks:
                return
            await asyncio.sleep(_LOOK_SECONDS)
        for task in list(self.server_state.tasks):
            task.cancel()
