"""The collections of an async client other than runs: the twin of ``collections``."""

from __future__ import annotations

import asyncio

from dstack_core import _adrive
from dstack_core._operations import Operations
from dstack_core._transport.asynchronous import AsyncTransport
from dstack_core.models.account import Backend, Project


class AsyncProjectCollection:
    """The projects of the server: the twin of ``ProjectCollection``."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def list(self) -> list[Project]:
        """Return the projects that the user sees, without their members and backends.

        The twin of ``ProjectCollection.list``; raises the server errors.
        """
        return await _adrive.arun(self._operations.projects(), self._transport)

    async def get(self, name: str | None = None) -> Project:
        """Return one project with its members and backends; without a name the client's own.

        The twin of ``ProjectCollection.get``; raises ``ProjectNotFoundError``, ``AccessDeniedError`` and the
        other server errors.
        """
        return await _adrive.arun(self._operations.project(name), self._transport)


class AsyncBackendCollection:
    """The backends of the client's project: the twin of ``BackendCollection``."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def list(self) -> list[Backend]:
        """Return the project's backends, without credentials: the twin of ``BackendCollection.list``."""
        return list((await _adrive.arun(self._operations.project(), self._transport)).backends)


class AsyncRepoCollection:
    """The repository of ``from_config(repo_dir=...)``: the twin of ``RepoCollection``."""

    def __init__(self, operations: Operations, transport: AsyncTransport) -> None:
        self._operations = operations
        self._transport = transport

    async def init(self) -> None:
        """Register the client's repository with the server: the twin of ``RepoCollection.init``."""
        # Describing a repository runs git, which blocks.
        flow = await asyncio.to_thread(self._operations.init_repo)
        await _adrive.arun(flow, self._transport)
