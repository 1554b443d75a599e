"""A proxy between a client and a server that records the requests."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

import requests

_KEPT = ("authorization", "content-type", "x-api-version", "accept")


class CountingProxy:
    """A proxy that forwards requests to ``target`` and records their paths until the next ``take``."""

    def __init__(self, target: str) -> None:
        self._paths: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(target, self._paths))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def take(self) -> list[str]:
        """Return the last two parts of the paths requested since the last call."""
        paths, self._paths[:] = list(self._paths), []
        return ["/".join(path.partition("?")[0].split("/")[-2:]) for path in paths]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(target: str, paths: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            paths.append(self.path)
            headers = {name: value for name, value in self.headers.items() if name.lower() in _KEPT}
            reply = requests.post(f"{target}{self.path}", data=body, headers=headers, timeout=60)
            self.send_response(reply.status_code)
            for name in reply.headers.keys() - {"Content-Length", "Content-Encoding", "Transfer-Encoding"}:
                self.send_header(name, reply.headers[name])
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    return Handler
