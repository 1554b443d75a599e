"""Requests, replies and calls as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from urllib3.filepost import encode_multipart_formdata

T = TypeVar("T")

# A caller whose time is spent still gets one try: a request that connects at once is carried out by the
# server even when nobody waits for its reply.
_SHORTEST_TIMEOUT = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """Describe one HTTP request; ``path`` starts with a slash, ``body`` is sent as it is.

    ``body`` stays out of the repr: it may hold env values and passwords. ``path`` may be a whole address
    of another server; ``anonymous`` keeps the token out of the request. ``timeout`` (seconds) bounds the
    whole reply where the caller has less time than the transport allows; None leaves it to the transport.
    """

    method: str
    path: str
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    anonymous: bool = False
    timeout: float | None = None

    def url(self, server_url: str) -> str:
        """Return the address to send it to."""
        return self.path if self.path.startswith(("http://", "https://")) else server_url + self.path

    @classmethod
    def post(cls, path: str, payload: Any) -> Request:
        """Return a POST of ``payload`` as JSON; the content type is required since 0.22 (PROTOCOL 1.1)."""
        return cls("POST", path, json.dumps(payload).encode(), {"Content-Type": "application/json"})

    @classmethod
    def upload(cls, path: str, name: str, data: bytes) -> Request:
        """Return a POST of one file in the multipart field ``file`` (PROTOCOL 1.3)."""
        body, content_type = encode_multipart_formdata({"file": (name, data, "application/octet-stream")})
        return cls("POST", path, body, {"Content-Type": content_type})


@dataclass(frozen=True, slots=True)
class Reply:
    """Hold one HTTP reply; header names are lower case, ``body`` stays out of the repr."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """Return the body read as JSON; raises ``ValueError`` when it is none, or nested too deeply."""
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None


def text(value: Any) -> str | None:
    """Return what should be a text as one; None stays None."""
    return None if value is None else str(value)


def time_of(value: Any) -> datetime:
    """Read a time; one without a zone is in UTC. Raises ``ValueError`` and ``TypeError``."""
    time = datetime.fromisoformat(value)
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"expected a time, got {value}") from None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """Pair a request with how its reply is read.

    ``idempotent`` tells that sending it twice does no more than sending it once; ``place`` names server,
    project and run for the messages.
    """

    request: Request
    parse: Callable[[Reply], T]
    idempotent: bool = True
    place: str = ""

    def within(self, seconds: float) -> Call[T]:
        """Return the call with at most ``seconds`` for its reply."""
        limit = self.request.timeout
        timeout = seconds if limit is None else min(seconds, limit)
        return replace(self, request=replace(self.request, timeout=max(timeout, _SHORTEST_TIMEOUT)))
