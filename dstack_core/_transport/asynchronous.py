"""Carry requests with ``httpx``, from one event loop.

All time limits of a request are one timer that is moved on as bytes arrive (``settings.Limits``): a wait for
the head, then for each part, and never beyond the limit of the whole reply. ``httpx`` has a timer for each
wait, and the timers that have ended stay in the event loop: at hundreds of requests a second they were most
of the memory of a busy Airflow triggerer. Only the connect keeps httpx's limit, to be named in the error.
Bodies are read raw, so that one decoder with a limit serves both transports.
"""

from __future__ import annotations

import asyncio
import ssl

try:
    import httpx
except ImportError as error:
    raise ImportError(
        'AsyncClient needs httpx, which is not installed. Run: pip install "dstack-core[async]"'
    ) from error

from dstack_core._transport.settings import ACCEPTED, IDLE_SECONDS, Body, TransportSettings, no_answer
from dstack_core._wire.http_messages import Reply, Request
from dstack_core.errors import TransientServerError


class AsyncTransport:
    """A transport for one event loop.

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
                # One timer, not httpx's for each wait: see the beginning of this file.
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
        # Raised here, and not in an ``except``, it has no reference to the libraries' frames, whose locals
        # show the token to everything that prints them.
        raise TransientServerError(failure)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _new_client(settings: TransportSettings) -> httpx.AsyncClient:
    # httpx has deprecated a path as ``verify``, hence a context.
    bundle = settings.verify if isinstance(settings.verify, str) else None
    verify = ssl.create_default_context(cafile=bundle) if bundle else bool(settings.verify)

    def bearer(request: httpx.Request) -> httpx.Request:
        # An auth handler, not a header of the client: a single request can leave it out.
        request.headers["Authorization"] = f"Bearer {settings.token}"
        return request

    # 20 connections: ``_shared.transport`` divides them between log reads, other requests and pages of polls.
    return httpx.AsyncClient(
        auth=bearer,
        headers={"Accept-Encoding": ACCEPTED},
        timeout=httpx.Timeout(None, connect=settings.connect_timeout),
        limits=httpx.Limits(max_connections=20, keepalive_expiry=IDLE_SECONDS),
        verify=verify,
    )
