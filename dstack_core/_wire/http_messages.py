"""Requests, replies and calls as plain data, and how a reply becomes a value or an error.

A transport, or a test's double of one, takes a ``Request`` and returns a ``Reply``. ``Parse`` reads a reply:
a refusal becomes one of ``dstack_core.errors`` (``raise_for_refusal``, the only place that decides which),
and a reply that cannot be read a ``ProtocolError``. Errors name server, project and run, never the token or
the body of a request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from urllib3.filepost import encode_multipart_formdata

from dstack_core import errors
from dstack_core.errors import ProtocolError, RunNotFoundError

T = TypeVar("T")

# A caller whose time is spent still gets one try: a request that connects at once is carried out by the
# server even if the caller does not wait for its reply. Less may not be enough to connect, more exceeds the
# caller's limit.
_SHORTEST_TIMEOUT = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request; ``path`` starts with a slash, ``body`` is sent as it is.

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
    """One HTTP reply; header names are lower case, ``body`` stays out of the repr."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """Return the body read as JSON; raises ``ValueError`` if it is not JSON, or nested too deeply."""
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("expected JSON, got one that is nested too deeply") from None


def text(value: Any) -> str | None:
    """Return a value that should be a string as a string; None stays None."""
    return None if value is None else str(value)


def time_of(value: Any) -> datetime:
    """Read a time; one without a zone is in UTC. Raises ``ValueError`` and ``TypeError``."""
    # Servers write "Z" or "+00:00" by their age (PROTOCOL 1.1).
    time = datetime.fromisoformat(value)
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"expected a time, got {value}") from None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request and how its reply is read.

    ``idempotent`` is whether sending it twice does no more than sending it once, so that it may be retried;
    ``place`` names server, project and run for the messages.
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


# Statuses that may pass: of overload, of a proxy without its server (520 to 524 are Cloudflare's), and 500,
# with which dstack reports faults of its own. A status here that does not pass delays its error by the whole
# retry budget; one that is missing here ends a follower while a server restarts.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
# How many characters of a server's text an error shows. Without a limit a proxy's HTML page fills the log; a
# low one cuts the server's list of wrong fields.
_TEXT_LIMIT = 300
# How servers refuse a run whose volume or gateway is missing; the code is that of a missing run.
_NEEDED = ("Volume ", "Gateway ", "The service ", "This dstack-server ")
# What to do about one of them, where the server's text does not have it.
_WAYS = {
    "Volume ": "Create the volume in this project first, or correct `volumes` of the configuration.",
    "Gateway ": "Create the gateway in this project first, or correct `gateway` of the configuration.",
}
# What pydantic 2 and 1 call a key that the server does not know.
_UNKNOWN_FIELD = ("extra_forbidden", "value_error.extra")


@dataclass(frozen=True, slots=True)
class Place:
    """The place a call went to, for the messages: server, project and, where there is one, the run."""

    server_url: str
    project: str
    run_name: str | None = None

    def __str__(self) -> str:
        run = f", run {self.run_name}" if self.run_name else ""
        return f"{self.server_url} (project {self.project}{run})"


def raise_for_refusal(reply: Reply, place: Place) -> None:
    """Return when the reply is a success; else raise the error of ``dstack_core.errors`` it stands for."""
    if 200 <= reply.status < 300:
        return
    detail = _detail_of(reply)
    text, code = detail or (_short(reply.body.decode(errors="replace")), None)
    if reply.status in _TRANSIENT:
        raise errors.TransientServerError(
            f"{place} answered {reply.status}: {text}", retry_after=reply.headers.get("retry-after")
        )
    if 300 <= reply.status < 400:
        target = reply.headers.get("location", "another address")
        raise errors.ProtocolError(f"{place} redirects to {target}. Set the server URL to that address.")
    if reply.status == 413:
        raise errors.RequestRejectedError(f"{place} refused the request as too big (413: {text})", status=413)
    # A refusal of dstack always has a ``detail``.
    if detail is None:
        raise _not_dstack(reply.status, text, place)
    raise _refusal(reply.status, text, code, place)


def _refusal(status: int, text: str, code: str | None, place: Place) -> errors.ServerError:
    # A bad token is a 403 like a missing membership (PROTOCOL 1.1); only the text differs.
    if status == 401 or (status == 403 and "token" in text.lower()):
        return errors.AuthenticationError(
            f"{place.server_url} refused the token ({status}: {text}). Check that it is the token of a user "
            "of this server."
        )
    if status == 403:
        return errors.AccessDeniedError(
            f"{place.server_url} denies this token's user the project {place.project!r} ({text}). "
            "Ask an admin of the project to add the user, or use another project."
        )
    # A missing run is a 400 with this code; a 404 is a missing project, or a path that is not dstack's.
    if code == "resource_not_exists" and place.run_name and not text.startswith(_NEEDED):
        return errors.RunNotFoundError(f"{place} has no such run")
    if status == 404 and text == "Not found":
        return errors.ProjectNotFoundError(
            f"{place.server_url} has no project {place.project!r}. Check the name: DSTACK_PROJECT, "
            "project_name= or ~/.dstack/config.yml."
        )
    if status == 404:
        return _not_dstack(status, text, place, kind="a dstack server, 0.18.44 or newer")
    if status == 405:
        return errors.UnsupportedServerError(
            f"the dstack server at {place.server_url} does not have this call ({text}); "
            "dstack 0.18.44 or newer is needed",
            status=status,
        )
    message = f"{place} refused the request: {text}"
    if code == "resource_not_exists" and place.run_name:
        way = next((way for start, way in _WAYS.items() if text.startswith(start)), None)
        message += "" if way is None else f". {way}"
    return errors.RequestRejectedError(message, code=code, status=status)


def _not_dstack(status: int, text: str, place: Place, kind: str = "a dstack server") -> errors.ProtocolError:
    return errors.ProtocolError(
        f"{place.server_url} answered {status}: {text}. Is this the address of {kind}?", status=status
    )


def _detail_of(reply: Reply) -> tuple[str, str | None] | None:
    """Return the text and code of ``detail``, a str, a dict or a list of dicts; None if it is missing."""
    try:
        detail = reply.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return None
    items = detail if isinstance(detail, list) else [detail]
    texts: list[str] = []
    code: str | None = None
    for item in items:
        if isinstance(item, dict):
            code = code or item.get("code")
            text = _with_location(item)
        else:
            text = str(item)
        if text not in texts:
            texts.append(text)
    return _short("; ".join(texts)), code


def _with_location(item: dict[str, Any]) -> str:
    message = str(item.get("msg", ""))
    if item.get("type") in _UNKNOWN_FIELD:
        message = "there is no such field; check its spelling"
    where = ".".join(str(part) for part in item.get("loc") or [] if not _is_noise(part))
    return f"{where}: {message}" if where else message


def _is_noise(part: Any) -> bool:
    """Return whether a part of a location names the server's own classes, not a key of the user."""
    return part in ("body", "plan", "__root__") or (isinstance(part, str) and not part.islower())


def _short(text: str) -> str:
    text = " ".join(text.split()) or "no text"
    return text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + "..."


@dataclass(frozen=True, slots=True)
class Parse(Generic[T]):
    """A reader of replies that passes the JSON to ``read``; ``path`` is that of the request."""

    place: Place
    path: str
    read: Callable[[Any], T]

    def __call__(self, reply: Reply) -> T:
        """Return the value of the reply. Raises the server errors."""
        raise_for_refusal(reply, self.place)
        # ``read`` is written for replies of dstack. If it fails, the reply is from something else, or from a
        # version that changed a field.
        try:
            return self.read(reply.json())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ProtocolError(
                f"{self.place} sent an unexpected reply to {self.path} "
                f"({type(error).__name__}: {error}). Is this the address of a dstack server?"
            ) from error


@dataclass(frozen=True, slots=True)
class NoneWhenMissing(Generic[T]):
    """A reader that returns None for a run that does not exist."""

    parse: Callable[[Reply], T]

    def __call__(self, reply: Reply) -> T | None:
        """Return the value of the reply. Raises the other server errors."""
        try:
            return self.parse(reply)
        except RunNotFoundError:
            return None
