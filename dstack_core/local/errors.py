"""Error replies of the server, with body and status as 0.22.5 sends them (PROTOCOL 1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ApiError(Exception):
    """An error reply: its status and its JSON `detail`."""

    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


class ServerBugError(Exception):
    """A bug of the real server, which answers 500 with plain text (PROTOCOL 1.1)."""


def bad_request(message: str, code: str = "error") -> ApiError:
    """Return the 400 for a request that the server rejects."""
    return ApiError(400, [{"msg": message, "code": code}])


def not_exists(message: str) -> ApiError:
    """Return the 400 for something that does not exist."""
    return bad_request(message, "resource_not_exists")


def unauthenticated() -> ApiError:
    """Return the 401 for a request without a token."""
    return ApiError(401, "Not authenticated")


def invalid_token() -> ApiError:
    """Return the 403 for a wrong token."""
    return ApiError(403, {"msg": "Invalid token", "code": None})


def unknown_project() -> ApiError:
    """Return the 404 for a project that does not exist."""
    return ApiError(404, {"msg": "Not found", "code": None})


def invalid(errors: Sequence[Any]) -> ApiError:
    """Return the 422 for a body that does not fit the schema; `errors` come from pydantic."""
    return ApiError(
        422,
        [{"loc": ["body", *error["loc"]], "msg": error["msg"], "type": error["type"]} for error in errors],
    )
