"""Turn a reply that is no success into an exception: the one place that does (PROTOCOL 1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstack_core import errors
from dstack_core._wire.plain import Reply

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_TEXT_LIMIT = 300


@dataclass(frozen=True, slots=True)
class Place:
    """Name where a call went, for the messages: server, project and, where there is one, the run."""

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
    told = _told_by(reply)
    text, code = told or (_short(reply.body.decode(errors="replace")), None)
    if reply.status in _TRANSIENT:
        raise errors.TransientServerError(
            f"{place} answered {reply.status}: {text}", retry_after=reply.headers.get("retry-after")
        )
    if 300 <= reply.status < 400:
        target = reply.headers.get("location", "another address")
        raise errors.ProtocolError(f"{place} redirects to {target}. Set the server URL to that address.")
    if reply.status == 413:
        raise errors.RequestRejectedError(f"{place} refused the request as too big (413: {text})", status=413)
    if told is None:
        raise _not_dstack(reply.status, text, place)
    raise _refusal(reply.status, text, code, place)


def _refusal(status: int, text: str, code: str | None, place: Place) -> errors.ServerError:
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
    if code == "resource_not_exists" and place.run_name:
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
    return errors.RequestRejectedError(f"{place} refused the request: {text}", code=code, status=status)


def _not_dstack(status: int, text: str, place: Place, kind: str = "a dstack server") -> errors.ProtocolError:
    return errors.ProtocolError(
        f"{place.server_url} answered {status}: {text}. Is this the address of {kind}?", status=status
    )


def _told_by(reply: Reply) -> tuple[str, str | None] | None:
    """Read ``detail``, which may be a str, a dict or a list of dicts; None when there is none."""
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
    where = ".".join(str(part) for part in item.get("loc") or [] if not _is_noise(part))
    return f"{where}: {message}" if where else message


def _is_noise(part: Any) -> bool:
    """Drop the parts of a location that name the server's own classes, not the user's keys."""
    return part in ("body", "plan", "__root__") or (isinstance(part, str) and not part.islower())


def _short(text: str) -> str:
    text = " ".join(text.split()) or "no text"
    return text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + "..."
