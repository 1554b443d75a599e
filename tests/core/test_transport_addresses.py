"""The address of a request and whether the token is sent, over real sockets, in both transports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core._transport.blocking import BlockingTransport
from dstack_core._transport.settings import TransportSettings
from dstack_core._wire.http_messages import Reply, Request

Send = Callable[[TransportSettings, Request], Reply]


class Seen:
    """A server on a free port that records its requests."""

    def __init__(self) -> None:
        seen = self.requests = list[tuple[str, str | None]]()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                seen.append((self.path, self.headers["Authorization"]))
                self.send_response(200)
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def pair() -> Iterator[tuple[Seen, Seen]]:
    servers = Seen(), Seen()
    yield servers
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def blocking(settings: TransportSettings, request: Request) -> Reply:
    transport = BlockingTransport(settings)
    try:
        return transport(request)
    finally:
        transport.close()


def asynchronous(settings: TransportSettings, request: Request) -> Reply:
    async def go() -> Reply:
        transport = AsyncTransport(settings)
        try:
            return await transport(request)
        finally:
            await transport.close()

    return asyncio.run(go())


@pytest.mark.parametrize("send", [blocking, asynchronous])
def test_the_token_is_sent_except_with_anonymous_requests(send: Send, pair: tuple[Seen, Seen]) -> None:
    own, other = pair
    settings = TransportSettings(own.url, "tok-1")
    assert send(settings, Request("HEAD", "/proxy/x/")).status == 200
    assert send(settings, Request("GET", "/proxy/x/", anonymous=True)).status == 200
    assert send(settings, Request("HEAD", f"{other.url}/y")).status == 200
    assert send(settings, Request("HEAD", f"{other.url}/z", anonymous=True)).status == 200
    assert own.requests == [("/proxy/x/", "Bearer tok-1"), ("/proxy/x/", None)]
    assert other.requests == [("/y", "Bearer tok-1"), ("/z", None)]
