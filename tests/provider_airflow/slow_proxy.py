"""A TCP proxy that makes a server on loopback slow: every reply comes ``delay`` seconds after its request."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self

_CHUNK = 65536


class SlowProxy:
    """A proxy of ``port``; each reply waits ``delay`` seconds from the last byte of its request on."""

    def __init__(self, port: int, delay: float) -> None:
        self.delay = delay
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = {self._listener}

    @property
    def url(self) -> str:
        """Return the address of the proxy."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        asked_at = time.monotonic()
        with (
            contextlib.suppress(OSError),
            client,
            socket.create_connection(("127.0.0.1", self._port)) as server,
        ):
            self._open |= {client, server}

            def requests() -> None:
                nonlocal asked_at
                with contextlib.suppress(OSError):
                    while data := client.recv(_CHUNK):
                        asked_at = time.monotonic()
                        server.sendall(data)
                    server.shutdown(socket.SHUT_WR)

            threading.Thread(target=requests, daemon=True).start()
            while data := server.recv(_CHUNK):
                time.sleep(max(0.0, asked_at + self.delay - time.monotonic()))
                client.sendall(data)
            self._open -= {client, server}
