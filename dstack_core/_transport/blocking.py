"""Carry requests with ``requests``."""

from __future__ import annotations

import threading
import weakref

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from dstack_core._transport.deadline import ReplyDeadline, TooSlow
from dstack_core._transport.reading import Body
from dstack_core._transport.sessions import new_session, no_token
from dstack_core._transport.settings import TransportSettings, no_answer
from dstack_core._wire.plain import Reply, Request
from dstack_core.errors import TransientServerError

_PART = 256 * 1024


class BlockingTransport:
    """Send requests from any thread; every thread has a session of its own.

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
        # Raised out here it does not hold on to the libraries' frames, in which the token is in plain sight.
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
    # Unlike the other ways to read, this one returns whenever bytes have come.
    while part := reply.raw.read1(_PART, decode_content=False):
        body.add(part)
    return body.whole()
