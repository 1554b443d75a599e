"""Carry requests with ``requests``, from any thread.

The problem: ``requests`` bounds the wait for each piece of a reply. A server that sends a byte a second, in
the head or in the body, holds a caller forever, and there is no hook to end that.

The idea: the deadline sits below the HTTP parser. ``DeadlineAdapter`` gives urllib3 connection pools whose
replies read from the socket through ``_Until``, which raises ``TooSlow`` at the first read after the
deadline. So it bounds everything that is read: status line, headers (``100 Continue`` too), chunk sizes and
body.

Invariants: a reply ends at most one read timeout after its deadline. A thread has its own session, so no two
requests share a deadline. Connections are pooled as usual. Only public names of requests and urllib3 are
used.
"""

from __future__ import annotations

import io
import threading
import time
import weakref
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.poolmanager import pool_classes_by_scheme

from dstack_core._transport.settings import ACCEPTED, Body, TransportSettings, no_answer
from dstack_core._wire.http_messages import Reply, Request
from dstack_core.errors import TransientServerError

# At most so many bytes are read at once, into one buffer. Small parts take more turns of Python for a large
# log page; a large one takes memory in each thread.
_PART = 256 * 1024


class BlockingTransport:
    """A transport for any thread; each thread has a session of its own.

    Raises ``TransientServerError`` when there is no whole reply in time.
    """

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._local = threading.local()
        self._sessions: weakref.WeakSet[requests.Session] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        """Return the reply, whatever its status."""
        settings = self._settings
        limits = settings.within(request.timeout)
        try:
            with self._session(limits.whole).request(
                request.method,
                request.url(settings.server_url),
                data=request.body,
                headers=dict(request.headers),
                timeout=(limits.connect, limits.read),
                allow_redirects=False,
                verify=settings.verify,
                auth=no_token if request.anonymous else None,
                stream=True,
            ) as reply:
                body = _read(reply)
            return Reply(reply.status_code, {k.lower(): v for k, v in reply.headers.items()}, body)
        except TooSlow:
            failure = limits.too_slow
        except requests.ConnectTimeout:
            failure = limits.no_connection
        except (requests.ReadTimeout, ReadTimeoutError):
            failure = limits.too_silent
        except (requests.RequestException, HTTPError) as error:
            failure = no_answer(error)
        # Raised here, and not in an ``except``, it has no reference to the libraries' frames, whose locals
        # show the token to everything that prints them.
        raise TransientServerError(failure)

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for session in list(self._sessions):
                session.close()

    def _session(self, seconds: float) -> requests.Session:
        """Return this thread's session; its next reply may take ``seconds`` in all."""
        deadline: ReplyDeadline | None = getattr(self._local, "deadline", None)
        if deadline is None:
            deadline = self._local.deadline = ReplyDeadline()
            session = self._local.session = new_session(self._settings.token, deadline)
            with self._lock:
                self._sessions.add(session)
        deadline.seconds = seconds
        thread_session: requests.Session = self._local.session
        return thread_session


def _read(reply: requests.Response) -> bytes:
    body = Body(reply.headers.get("Content-Encoding"))
    # Unlike the other ways to read, this one returns whenever bytes have arrived, so the deadline is checked.
    while part := reply.raw.read1(_PART, decode_content=False):
        body.add(part)
    return body.whole()


def new_session(token: str, deadline: ReplyDeadline) -> requests.Session:
    """Return a session for one thread; ``deadline`` bounds each of its replies."""
    session = requests.Session()
    session.auth = _Bearer(token)
    session.headers["Accept-Encoding"] = ACCEPTED
    for scheme in ("http://", "https://"):
        session.mount(scheme, DeadlineAdapter(deadline))
    return session


def no_token(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leave the token out of the request."""
    return request


class _Bearer(AuthBase):
    """The token as an auth handler: a plain header would lose to an entry in ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class TooSlow(Exception):
    """The error for a reply that was not complete in time."""


@dataclass(slots=True)
class ReplyDeadline:
    """The seconds that the next reply of one session may take, set before each request.

    A session belongs to one thread, so no two requests share it at the same time.
    """

    seconds: float = float("inf")


class DeadlineAdapter(HTTPAdapter):
    """An adapter that raises ``TooSlow`` when a reply takes too long, however many bytes keep coming."""

    def __init__(self, deadline: ReplyDeadline) -> None:
        self._pools = _pools(deadline)
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Make the pools for servers that are reached directly."""
        super().init_poolmanager(*args, **options)
        self._bound(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        """Make the pools for servers that are reached through a proxy."""
        return self._bound(super().proxy_manager_for(*args, **options))

    def _bound(self, manager: PoolManager) -> PoolManager:
        # Pools for SOCKS are classes of their own and stay as they are: only the read timeout bounds those.
        if manager.pool_classes_by_scheme is pool_classes_by_scheme:
            manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(deadline: ReplyDeadline) -> dict[str, type[HTTPConnectionPool]]:
    # urllib3 and http.client find each next class in an attribute of the class above it, so the session's
    # deadline can only reach the reply through classes that are made for it.
    class Timed(HTTPResponse):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.fp = io.BufferedReader(_Until(time.monotonic() + deadline.seconds, self.fp.detach()))

    class Plain(HTTPConnection):
        response_class = Timed

    class Encrypted(HTTPSConnection):
        response_class = Timed

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class EncryptedPool(HTTPSConnectionPool):
        ConnectionCls = Encrypted

    return {"http": PlainPool, "https": EncryptedPool}


class _Until(io.RawIOBase):
    """A stream that raises ``TooSlow`` at the first read after ``deadline``, on the monotonic clock."""

    def __init__(self, deadline: float, source: io.RawIOBase) -> None:
        self._deadline = deadline
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TooSlow
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()
