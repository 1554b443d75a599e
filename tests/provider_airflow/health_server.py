"""A server on loopback in place of Airflow's API server, which answers a few paths with given replies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PUBLIC = "/api/v2/monitor/health"
EXECUTION = "/execution/health"

HEALTHY = {"metadatabase": {"status": "healthy"}, "scheduler": {"status": "unhealthy"}}
NO_DATABASE = {"metadatabase": {"status": "unhealthy"}}


@dataclass
class HealthServer:
    """A running server: ``replies`` by path as status and body, every one after ``delay`` seconds."""

    url: str = ""
    delay: float = 0.0
    replies: dict[str, tuple[int, object]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)


@contextmanager
def health_server(port: int = 0) -> Iterator[HealthServer]:
    """Serve on ``port``, by default a free one; paths that have no reply get 404 as FastAPI words it."""
    server = HealthServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            server.authorizations += self.headers.get_all("Authorization", [])
            time.sleep(server.delay)
            status, body = server.replies.get(self.path, (404, {"detail": "Not Found"}))
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
