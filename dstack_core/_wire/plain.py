"""Requests, replies and calls as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """Describe one HTTP request; ``path`` starts with a slash, ``body`` is sent as it is.

    ``body`` stays out of the repr: it may hold env values and passwords.
    """

    method: str
    path: str
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def post(cls, path: str, payload: Any) -> Request:
        """Return a POST of ``payload`` as JSON; the content type is required since 0.22 (PROTOCOL 1.1)."""
        return cls("POST", path, json.dumps(payload).encode(), {"Content-Type": "application/json"})


@dataclass(frozen=True, slots=True)
class Reply:
    """Hold one HTTP reply; header names are lower case, ``body`` stays out of the repr."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """Return the body read as JSON; raises ``ValueError`` when it is none."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """Pair a request with how its reply is read.

    ``idempotent`` tells that sending it twice does no more than sending it once.
    """

    request: Request
    parse: Callable[[Reply], T]
    idempotent: bool = True
