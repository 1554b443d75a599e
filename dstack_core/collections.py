"""The collections of a client other than runs: projects, backends and repositories."""

from __future__ import annotations

from dstack_core import _drive
from dstack_core._operations import Operations
from dstack_core._transport.blocking import BlockingTransport
from dstack_core.models.account import Backend, Project


class ProjectCollection:
    """The projects of the server: ``client.projects``."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def list(self) -> list[Project]:
        """Return the projects that the user sees, without their members and backends.

        Raises the server errors.
        """
        return _drive.run(self._operations.projects(), self._transport)

    def get(self, name: str | None = None) -> Project:
        """Return one project with its members and backends; without a name the client's own.

        Raises ``ProjectNotFoundError``, ``AccessDeniedError`` and the other server errors.
        """
        return _drive.run(self._operations.project(name), self._transport)


class BackendCollection:
    """The backends of the client's project: ``client.backends``."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def list(self) -> list[Backend]:
        """Return the project's backends, without credentials. Raises the server errors."""
        return list(_drive.run(self._operations.project(), self._transport).backends)


class RepoCollection:
    """The repository of ``from_config(repo_dir=...)``: ``client.repos``."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def init(self) -> None:
        """Register the client's repository and its credentials with the server; repeating it is fine.

        The first submit of a client does this unless the client was made with ``init=False``. It uploads
        no code.

        Raises:
            ConfigurationError: The client has no ``repo_dir``, a run could not clone the Git repository, or
                the key cannot be used; nothing was sent.
            ServerError: The server errors.

        Source: the documented API, "from_config()"; PROTOCOL 1.3.
        """
        _drive.run(self._operations.init_repo(), self._transport)
