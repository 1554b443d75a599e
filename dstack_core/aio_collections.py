"""What the async client sees beside runs: the twin of ``collections``."""

from __future__ import annotations

import asyncio

from dstack_core import _adrive
from dstack_core._operations import Operations
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core.models.account import Backend, Project


class AsyncProjectCollection:
    """Find projects of the server: the twin of ``ProjectCollection``."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def list(self) -> list[Project]:
        """Return the projects the user sees: the twin of ``ProjectCollection.list``."""
        return await _adrive.arun(self._operations.projects(), self._transport)

    async def get(self, name: str | None = None) -> Project:
        """Return one project: the twin of ``ProjectCollection.get``."""
        return await _adrive.arun(self._operations.project(name), self._transport)


class AsyncBackendCollection:
    """List the backends of the client's project: the twin of ``BackendCollection``."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def list(self) -> list[Backend]:
        """Return the project's backends: the twin of ``BackendCollection.list``."""
        return list((await _adrive.arun(self._operations.project(), self._transport)).backends)


class AsyncRepoCollection:
    """Make the repository known to the server: the twin of ``RepoCollection``."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def init(self) -> None:
        """Make the client's repository known to the server: the twin of ``RepoCollection.init``."""
        flow = await asyncio.to_thread(self._operations.init_repo)
        await _adrive.arun(flow, self._transport)
