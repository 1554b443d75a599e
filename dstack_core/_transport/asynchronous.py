"""Carry requests with ``httpx``."""

from __future__ import annotations

import asyncio
import ssl

import httpx

from dstack_core._transport.settings import ACCEPTED, Body, TransportSettings, no_answer
from dstack_core._wire.http_messages import Reply, Request
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
        settings, now = self._settings, asyncio.get_running_loop().time
        limits = settings.within(request.timeout)
        if self._client is None:
            self._client = _new_client(settings)
        deadline = now() + limits.whole
        has_begun = False
        try:
            async with (
                # One timer, not httpx's for each wait: those that are over stay in the loop for long, and at
                # hundreds of requests a second they are most of what a process keeps.
                asyncio.timeout(limits.first_wait) as limit,
                self._client.stream(
                    request.method,
                    request.url(settings.server_url),
                    content=request.body,
                    headers=dict(request.headers),
                    auth=None if request.anonymous else httpx.USE_CLIENT_DEFAULT,
                ) as reply,
            ):
                has_begun = True
                body = Body(reply.headers.get("Content-Encoding"))
                async for part in reply.aiter_raw():
                    body.add(part)
                    limit.reschedule(min(deadline, now() + limits.read))
            headers = {name.lower(): value for name, value in reply.headers.items()}
            return Reply(reply.status_code, headers, body.whole())
        except httpx.ConnectTimeout:
            failure = limits.no_connection
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = no_answer(error)
        except TimeoutError:
            late = limits.too_slow if now() >= deadline else limits.too_silent
            failure = late if has_begun else limits.no_head
        # Raised out here it does not hold on to the libraries' frames, in which the token is in plain sight.
        raise TransientServerError(failure)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _new_client(settings: TransportSettings) -> httpx.AsyncClient:
    bundle = settings.verify if isinstance(settings.verify, str) else None
    verify = ssl.create_default_context(cafile=bundle) if bundle else bool(settings.verify)

    def bearer(request: httpx.Request) -> httpx.Request:
        request.headers["Authorization"] = f"Bearer {settings.token}"
        return request

    return httpx.AsyncClient(
        auth=bearer,
        headers={"Accept-Encoding": ACCEPTED},
        timeout=httpx.Timeout(None, connect=settings.connect_timeout),
        limits=httpx.Limits(max_connections=20),
        verify=verify,
    )
