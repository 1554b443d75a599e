"""What a client sees beside runs: projects, backends and repositories."""

from __future__ import annotations

from dstack_core import _drive
from dstack_core._operations import Operations
from dstack_core._transport.blocking import BlockingTransport
from dstack_core.models.account import Backend, Project


class ProjectCollection:
    """Find projects of the server: ``client.projects``."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def list(self) -> list[Project]:
        """Return the projects the user sees, without their members and backends. Raises the server errors."""
        return _drive.run(self._operations.projects(), self._transport)

    def get(self, name: str | None = None) -> Project:
        """Return one project with its members and backends; without a name the client's own.

        Raises ``ProjectNotFoundError``, ``AccessDeniedError`` and the other server errors.
        """
        return _drive.run(self._operations.project(name), self._transport)


class BackendCollection:
    """List the backends of the client's project: ``client.backends``."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def list(self) -> list[Backend]:
        """Return the project's backends, without credentials. Raises the server errors."""
        return list(_drive.run(self._operations.project(), self._transport).backends)


class RepoCollection:
    """Make the repository of ``from_config(repo_dir=...)`` known to the server: ``client.repos``."""

    def __init__(self, operations: Operations, transport: BlockingTransport) -> None:
        self._operations = operations
        self._transport = transport

    def init(self) -> None:
        """Make the client's repository and its credentials known to the server; again is fine.

        The first submit of a client does it by itself unless it was made with ``init=False``. Uploads
        no code. Raises ``ConfigurationError`` without a ``repo_dir``, for a Git repository a run could not
        clone, or for a key that cannot be used, before anything is sent; else the server errors. Source:
        the documented API, "from_config()"; PROTOCOL 1.3.
        """
        _drive.run(self._operations.init_repo(), self._transport)
