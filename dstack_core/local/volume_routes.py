"""The endpoints of volumes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from starlette.requests import Request

from dstack_core.local.errors import not_exists
from dstack_core.local.pages import page_of
from dstack_core.local.request_body import read_body
from dstack_core.local.resource_bodies import DeleteNamesRequest, GetNamedRequest
from dstack_core.local.state import State
from dstack_core.local.volume_specs import CreateVolumeRequest, ListVolumesRequest

Handler = Callable[[Request], Coroutine[Any, Any, Any]]


class VolumeApi:
    """The endpoints of volumes, one method each."""

    def __init__(self, state: State) -> None:
        self._state = state

    def endpoints(self) -> Iterator[tuple[str, Handler]]:
        """Yield each path and its handler."""
        project = "/api/project/{project}"
        yield "/api/volumes/list", self._list
        yield f"{project}/volumes/list", self._list_of_project
        yield f"{project}/volumes/get", self._get
        yield f"{project}/volumes/create", self._create
        yield f"{project}/volumes/delete", self._delete

    async def _list(self, request: Request) -> Any:
        body = await read_body(request, ListVolumesRequest)
        if body.project_name not in (None, self._state.settings.project):
            return []
        volumes = self._state.volumes
        found = volumes.present if body.only_active else volumes.volumes
        return [one.wire() for one in page_of(found, body)]

    async def _list_of_project(self, request: Request) -> Any:
        return [one.wire() for one in self._state.volumes.present]

    async def _get(self, request: Request) -> Any:
        body = await read_body(request, GetNamedRequest)
        found = self._state.volumes.named(body.name)
        if found is None:
            raise not_exists("Resource not found")
        return found.wire()

    async def _create(self, request: Request) -> Any:
        body = await read_body(request, CreateVolumeRequest)
        return self._state.volumes.create(body.configuration).wire()

    async def _delete(self, request: Request) -> Any:
        self._state.volumes.delete((await read_body(request, DeleteNamesRequest)).names)
