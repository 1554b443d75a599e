"""Make sessions of ``requests`` that give the token, ask for little, and end in time."""

from __future__ import annotations

import requests
from requests.auth import AuthBase

from dstack_core._transport.deadline import DeadlineAdapter
from dstack_core._transport.reading import ACCEPTED
from dstack_core._transport.settings import TransportSettings


def new_session(settings: TransportSettings) -> requests.Session:
    """Return a session for one thread."""
    session = requests.Session()
    session.auth = _Bearer(settings.token)
    session.headers["Accept-Encoding"] = ACCEPTED
    for scheme in ("http://", "https://"):
        session.mount(scheme, DeadlineAdapter(settings.whole_timeout))
    return session


def no_token(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leave the request without the token."""
    return request


class _Bearer(AuthBase):
    """Set the token as an auth handler: a plain header would lose to an entry in ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request
