"""Uvicorn without its effects on the process (logging, signal handlers), and with a callback when ready."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol


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
            # Seconds that requests in progress get when the server stops. A request to a service may take
            # longer; it is cut off.
            timeout_graceful_shutdown=5,
        )

    def configure_logging(self) -> None:
        """Do nothing."""


class ReadyServer(uvicorn.Server):
    """A server that calls back when it answers requests, and when it begins to stop."""

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], on_exit: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_exit = on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call ``on_ready``."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call ``on_exit`` and stop at the same time, because it ends the requests that a fault delays."""
        await asyncio.gather(super().shutdown(sockets), self._on_exit())
