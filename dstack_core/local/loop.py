"""Uvicorn without its effects on the process: no logging setup, no signal handlers, an event when ready."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol


class QuietProtocol(H11Protocol):
    """Write no access log, whatever handlers the process has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.access_log = False


class QuietConfig(uvicorn.Config):
    """Leave the logging of the process as it is: other servers of the process share its loggers."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            app,
            http=QuietProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )

    def configure_logging(self) -> None:
        """Do nothing."""


class ReadyServer(uvicorn.Server):
    """Tell when requests are answered, and when the end begins."""

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], on_exit: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_exit = on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell, and stop meanwhile."""
        await asyncio.gather(super().shutdown(sockets), self._on_exit())
