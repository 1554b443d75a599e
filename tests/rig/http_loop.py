"""One thread that serves the many small HTTP APIs of the rig."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import Future

import uvicorn
from starlette.applications import Starlette

# An upper bound for a busy machine; the wait returns as soon as the thread has ended.
_STOP_SECONDS = 10.0


class Listener:
    """One API on its own loopback port."""

    def __init__(self, port: int, server: uvicorn.Server, served: Future[None]) -> None:
        self.port = port
        self._server = server
        self._served = served

    def close(self) -> None:
        """Request the end of the API; may be called from one of its own requests."""
        self._server.should_exit = True

    def wait(self) -> None:
        """Wait until the API has ended."""
        self._served.result(_STOP_SECONDS)


class HttpLoop:
    """An event loop in a thread that serves applications."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rig-http", daemon=True)
        self._thread.start()
        self._listeners: list[Listener] = []

    def serve(self, app: Starlette, address: str = "127.0.0.1") -> Listener:
        """Serve an application on a free port; connections are accepted from now on."""
        listening = socket.socket()
        listening.bind((address, 0))
        # The backlog holds early connections until the loop accepts them, so no caller has to wait for the start.
        listening.listen(128)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            # The real job agent uses neither pings nor compression.
            ws="websockets-sansio",
            ws_ping_interval=None,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        served = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listening]), self._loop)
        listener = Listener(listening.getsockname()[1], server, served)
        self._listeners.append(listener)
        return listener

    def stop(self) -> None:
        """End every API and the thread."""
        for listener in self._listeners:
            listener.close()
        for listener in self._listeners:
            listener.wait()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()
