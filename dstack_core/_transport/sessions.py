"""Make sessions of ``requests`` that give the token, ask for little, and end in time."""

from __future__ import annotations

import requests
from requests.auth import AuthBase

from dstack_core._transport.deadline import DeadlineAdapter, ReplyDeadline
from dstack_core._transport.reading import ACCEPTED


def new_session(token: str, deadline: ReplyDeadline) -> requests.Session:
    """Return a session for one thread; ``deadline`` bounds each of its replies."""
    session = requests.Session()
    session.auth = _Bearer(token)
    session.headers["Accept-Encoding"] = ACCEPTED
    for scheme in ("http://", "https://"):
        session.mount(scheme, DeadlineAdapter(deadline))
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
