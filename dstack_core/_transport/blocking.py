"""Carry requests with ``requests``."""

from __future__ import annotations

import threading
import time
import weakref

import requests
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError

from dstack_core._transport.reading import read_whole
from dstack_core._transport.settings import TransportSettings, no_answer
from dstack_core._wire.plain import Reply, Request
from dstack_core.errors import TransientServerError


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
        deadline = time.monotonic() + settings.whole_timeout
        try:
            with self._session().request(
                request.method,
                request.url(settings.server_url),
                data=request.body,
                headers=dict(request.headers),
                timeout=(settings.connect_timeout, settings.timeout),
                allow_redirects=False,
                verify=settings.verify,
                auth=_no_token if request.anonymous else None,
                stream=True,
            ) as reply:
                body = read_whole(reply, settings, deadline)
        except (requests.RequestException, HTTPError) as error:
            raise TransientServerError(no_answer(error)) from None
        return Reply(reply.status_code, {k.lower(): v for k, v in reply.headers.items()}, body)

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for session in list(self._sessions):
                session.close()

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.auth = _Bearer(self._settings.token)
            with self._lock:
                self._sessions.add(session)
        return session


def _no_token(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class _Bearer(AuthBase):
    """Set the token as an auth handler: a plain header would lose to an entry in ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request
