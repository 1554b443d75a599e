"""The endpoints of what a project holds beside its runs: secrets."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from starlette.requests import Request

from dstack_core.local import bodies
from dstack_core.local.request_body import read_body
from dstack_core.local.state import State

Handler = Callable[[Request], Coroutine[Any, Any, Any]]


class ResourceApi:
    """The endpoints of secrets, one method each."""

    def __init__(self, state: State) -> None:
        self._state = state

    def endpoints(self) -> Iterator[tuple[str, Handler]]:
        """Yield each path and its handler."""
        project = "/api/project/{project}"
        yield f"{project}/secrets/list", self._list_secrets
        yield f"{project}/secrets/get", self._get_secret
        yield f"{project}/secrets/create_or_update", self._set_secret
        yield f"{project}/secrets/delete", self._delete_secrets

    async def _list_secrets(self, request: Request) -> Any:
        return self._state.secrets.all()

    async def _get_secret(self, request: Request) -> Any:
        return self._state.secrets.get((await read_body(request, bodies.GetSecretRequest)).name)

    async def _set_secret(self, request: Request) -> Any:
        body = await read_body(request, bodies.SetSecretRequest)
        return self._state.secrets.set(body.name, body.value)

    async def _delete_secrets(self, request: Request) -> Any:
        self._state.secrets.delete((await read_body(request, bodies.DeleteSecretsRequest)).secrets_names)
