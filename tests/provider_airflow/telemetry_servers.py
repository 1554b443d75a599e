"""What receives traces and metrics in tests: OpenTelemetry's protocol over HTTP, and StatsD over UDP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """A collector of spans at ``url``; each span is the message that was received."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Any] = []

    def take(self, body: bytes) -> None:
        """Keep the spans of one request."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def named(self, name: str) -> list[Any]:
        """Return the spans of this name, in the order of their arrival."""
        return [span for span in list(self.spans) if span.name == name]

    def below(self, parent: Any) -> list[Any]:
        """Return the spans whose parent is ``parent``, by their begin."""
        found = [span for span in list(self.spans) if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))


def attributes_of(span: Any) -> dict[str, Any]:
    """Return the attributes of a span as plain values."""
    kinds = {each.key: (each.value, each.value.WhichOneof("value")) for each in span.attributes}
    return {key: getattr(value, kind) for key, (value, kind) in kinds.items() if kind}


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class StatsdPort:
    """A UDP port of StatsD's; ``lines`` are the metrics that arrived."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.lines: list[str] = []

    def of(self, prefix: str) -> list[str]:
        """Return the metrics whose name begins like this."""
        return [line for line in list(self.lines) if line.startswith(prefix)]


@contextmanager
def statsd_port() -> Iterator[StatsdPort]:
    """Listen on a free UDP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        port = StatsdPort(receiver.getsockname()[1])

        def receive() -> None:
            while (data := receiver.recv(65536)) != b"end":
                port.lines.extend(data.decode().splitlines())

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        try:
            yield port
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"end", ("127.0.0.1", port.port))
            thread.join(10)
