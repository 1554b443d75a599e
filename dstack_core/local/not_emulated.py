"""The endpoints of 0.22.5 that are not emulated: they return empty lists, "not found" or a refusal.

On a 405, dstack's own client shows the bare status without a reason, so every path of the real server is
answered.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from starlette.requests import Request

from dstack_core.local.errors import bad_request, not_exists

Handler = Callable[[Request], Coroutine[Any, Any, Any]]

_EMPTY = (
    "/api/backends/list_types",
    *("/api/users/public_keys/list", "/api/auth/list_providers"),
)
_EMPTY_OF_PROJECT = ("templates/list", "exports/list", "imports/list")
_MISSING = ("instances/get_instance_health_checks", "exports/update", "exports/delete", "imports/delete")
_REFUSED = (
    *(
        "/api/users/list",
        "/api/users/get_user",
        "/api/users/create",
        "/api/users/update",
        "/api/users/delete",
    ),
    *("/api/users/refresh_ssh_key", "/api/users/refresh_token", "/api/users/public_keys/add"),
    *("/api/users/public_keys/delete", "/api/auth/get_next_redirect", "/api/projects/list_only_no_fleets"),
    *("/api/projects/create", "/api/projects/delete", "/api/sshproxy/get_upstream"),
)
_REFUSED_OF_NAMED_PROJECT = ("set_members", "add_members", "remove_members", "update")
_REFUSED_OF_PROJECT = (
    *("backends/create", "backends/update", "backends/delete", "backends/{backend}/config_info"),
    *("backends/create_yaml", "backends/update_yaml", "backends/{backend}/get_yaml"),
    *("gateways/get_plan", "gateways/apply", "gateways/create", "gateways/set_default"),
    *("gateways/set_wildcard_domain", "exports/create"),
)


async def nothing(request: Request) -> Any:
    """Return an empty list."""
    return []


async def missing(request: Request) -> Any:
    """Answer "not found" for a kind of thing that this server never has."""
    raise not_exists(f"{_subject(request)} not found: the embedded server has none.")


async def refused(request: Request) -> Any:
    """Refuse what only a real server can do."""
    path = request.url.path.removeprefix("/api/")
    raise bad_request(f"{path}: not emulated by the embedded server. Use a real dstack server for it.")


def _subject(request: Request) -> str:
    return request.url.path.split("/")[4].removesuffix("s").capitalize()


def endpoints() -> Iterator[tuple[str, Handler]]:
    """Yield each path and its handler."""
    project = "/api/project/{project}"
    yield from ((path, nothing) for path in _EMPTY)
    yield from ((f"{project}/{path}", nothing) for path in _EMPTY_OF_PROJECT)
    yield from ((f"{project}/{path}", missing) for path in _MISSING)
    yield from ((path, refused) for path in _REFUSED)
    yield from ((f"/api/projects/{{project}}/{path}", refused) for path in _REFUSED_OF_NAMED_PROJECT)
    yield from ((f"{project}/{path}", refused) for path in _REFUSED_OF_PROJECT)
