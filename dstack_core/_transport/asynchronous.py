"""Carry requests with ``httpx``."""

from __future__ import annotations

import asyncio
import ssl

import httpx

from dstack_core._transport.reading import ACCEPTED, Body
from dstack_core._transport.settings import TransportSettings, no_answer
from dstack_core._wire.plain import Reply, Request
from dstack_core.errors import TransientServerError


class AsyncTransport:
    """Send requests from one event loop.

    Raises ``TransientServerError`` when there is no whole reply in time.
    """

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._client: httpx.AsyncClient | None = None

    async def __call__(self, request: Request) -> Reply:
        """Return the reply, whatever its status."""
        settings = self._settings
        if self._client is None:
            self._client = _new_client(settings)
        try:
            async with (
                asyncio.timeout(settings.whole_timeout),
                self._client.stream(
                    request.method,
                    request.url(settings.server_url),
                    content=request.body,
                    headers=dict(request.headers),
                    auth=None if request.anonymous else httpx.USE_CLIENT_DEFAULT,
                ) as reply,
            ):
                body = await _read(reply)
            return Reply(reply.status_code, {k.lower(): v for k, v in reply.headers.items()}, body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = no_answer(error)
        except TimeoutError:
            failure = settings.too_slow
        # Raised out here it does not hold on to the libraries' frames, in which the token is in plain sight.
        raise TransientServerError(failure)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


async def _read(reply: httpx.Response) -> bytes:
    body = Body(reply.headers.get("Content-Encoding"))
    async for part in reply.aiter_raw():
        body.add(part)
    return body.whole()


def _new_client(settings: TransportSettings) -> httpx.AsyncClient:
    bundle = settings.verify if isinstance(settings.verify, str) else None
    verify = ssl.create_default_context(cafile=bundle) if bundle else bool(settings.verify)

    def bearer(request: httpx.Request) -> httpx.Request:
        request.headers["Authorization"] = f"Bearer {settings.token}"
        return request

    return httpx.AsyncClient(
        auth=bearer,
        headers={"Accept-Encoding": ACCEPTED},
        timeout=httpx.Timeout(settings.timeout, connect=settings.connect_timeout),
        limits=httpx.Limits(max_connections=20),
        verify=verify,
    )
