"""Carry requests with ``requests``, from any thread.

A thread has its own session, so no two requests share a deadline (``_transport/deadline.py``).
"""

from __future__ import annotations

import threading
import time
import weakref

import requests
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError, ReadTimeoutError

from dstack_core._transport.deadline import DeadlineAdapter, ReplyDeadline, TooSlow
from dstack_core._transport.settings import ACCEPTED, IDLE_SECONDS, Body, TransportSettings, no_answer
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
        finally:
            self._local.used_at = time.monotonic()
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
            self._local.used_at = time.monotonic()
            with self._lock:
                self._sessions.add(session)
        deadline.seconds = seconds
        thread_session: requests.Session = self._local.session
        if time.monotonic() - self._local.used_at > IDLE_SECONDS:
            # The session itself stays usable and opens another connection.
            thread_session.close()
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
