"""Hold what a client was told of its code, and describe or pack it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core._repo.archive import pack_directory
from dstack_core._repo.credentials import GitCredentials, Remote, clone_of
from dstack_core._repo.diff import take_diff
from dstack_core._repo.git import Git, is_top_of_repository, read_checkout
from dstack_core._wire.code import Code
from dstack_core.errors import ConfigurationError
from dstack_core.models.repos import RepoMapping


@dataclass(frozen=True, slots=True)
class Repository:
    """Hold the repository parameters of ``from_config``; secrets stay out of the repr.

    ``init`` tells whether submitting makes the repository known to the server.
    """

    directory: Path | None = None
    local_repo: bool = False
    credentials: GitCredentials = field(default_factory=GitCredentials)
    init: bool = True

    @classmethod
    def checked(
        cls,
        repo_dir: str | os.PathLike[str] | None = None,
        *,
        git_identity_file: str | os.PathLike[str] | None = None,
        oauth_token: str | None = None,
        git_private_key: str | None = None,
        local_repo: bool = False,
        init: bool = True,
    ) -> Repository:
        """Return the parameters; starts no process and sends nothing.

        Raises ``ConfigurationError`` for a directory or a file that is not there, and for two credentials.
        """
        credentials = GitCredentials.checked(git_identity_file, oauth_token, git_private_key)
        directory = None if repo_dir is None else check_directory(repo_dir)
        return cls(directory, local_repo, credentials, init)

    def describe(self) -> Code:
        """Return what the server is told of the repository. Runs git; raises ``ConfigurationError``."""
        if self.directory is None:
            raise ConfigurationError(
                "repo_dir: this client has none; name it with from_config(repo_dir=...) to use client.repos"
            )
        return self._code(self.directory, with_upload=False)

    def pack(self, repos: Sequence[RepoMapping | Mapping[str, str] | str] = ()) -> Code | None:
        """Return the code a run starts from, with its diff or its archive; None when there is none.

        ``repos`` are those of the run's configuration. Runs git and reads the files; raises
        ``ConfigurationError``.
        """
        if not repos:
            return None if self.directory is None else self._code(self.directory, with_upload=True)
        if self.directory is not None:
            raise ConfigurationError(
                f"repos: the client has the repo_dir {str(self.directory)!r} already; drop one of the two"
            )
        try:
            return self._named(RepoMapping.model_validate(repos[0]))
        except ConfigurationError as error:
            raise ConfigurationError(f"repos: {error.message.removeprefix('repo_dir: ')}") from None

    def _named(self, repo: RepoMapping) -> Code:
        if repo.local_path is not None:
            return self._code(check_directory(repo.local_path), with_upload=True)
        remote = Remote.parse(repo.url or "", Path.cwd())
        clone = clone_of(remote, self.credentials)
        return Code.of_git(remote.name, remote.location, repo.branch, repo.hash, clone, None)

    def _code(self, directory: Path, *, with_upload: bool) -> Code:
        if self.local_repo or not is_top_of_repository(directory):
            upload = pack_directory(directory) if with_upload else None
            return Code.of_directory(str(directory), upload)
        git = Git(directory)
        checkout = read_checkout(git)
        remote = Remote.parse(checkout.remote_url, directory)
        clone = clone_of(remote, self.credentials)
        diff = take_diff(git, checkout.commit) if with_upload else None
        return Code.of_git(remote.name, remote.location, checkout.branch, checkout.commit, clone, diff)


def check_directory(repo_dir: str | os.PathLike[str]) -> Path:
    """Return the directory with ``~`` expanded, or raise ``ConfigurationError`` when it is none."""
    path = Path(repo_dir).expanduser().resolve()
    if not path.is_dir():
        raise ConfigurationError(f"repo_dir: {os.fspath(repo_dir)!r} is no directory")
    return path
