"""Hold what a client was told of its code, and describe or pack it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core._repo.archive import pack_directory
from dstack_core._repo.credentials import Remote, check_identity, clone_of
from dstack_core._repo.diff import take_diff
from dstack_core._repo.git import Git, is_top_of_repository, read_checkout
from dstack_core._wire.code import Code
from dstack_core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Repository:
    """Hold the repository parameters of ``from_config``; the token stays out of the repr.

    ``init`` tells whether submitting makes the repository known to the server.
    """

    directory: Path
    local_repo: bool = False
    git_identity_file: Path | None = None
    oauth_token: str | None = field(default=None, repr=False)
    init: bool = True

    @classmethod
    def checked(
        cls,
        repo_dir: str | os.PathLike[str] | None,
        *,
        git_identity_file: str | os.PathLike[str] | None = None,
        oauth_token: str | None = None,
        local_repo: bool = False,
        init: bool = True,
    ) -> Repository | None:
        """Return the parameters, None without a ``repo_dir``; starts no process and sends nothing.

        Raises ``ConfigurationError`` for a directory or a file that is not there, and for two credentials.
        """
        identity = check_identity(None if git_identity_file is None else Path(git_identity_file), oauth_token)
        if repo_dir is None:
            return None
        return cls(check_directory(repo_dir), local_repo, identity, oauth_token, init)

    def describe(self) -> Code:
        """Return what the server is told of the repository. Runs git; raises ``ConfigurationError``."""
        return self._code(with_upload=False)

    def pack(self) -> Code:
        """Return the code with its diff or its archive. Runs git and reads the files; raises
        ``ConfigurationError``.
        """
        return self._code(with_upload=True)

    def _code(self, *, with_upload: bool) -> Code:
        if self.local_repo or not is_top_of_repository(self.directory):
            upload = pack_directory(self.directory) if with_upload else None
            return Code.of_directory(str(self.directory), upload)
        git = Git(self.directory)
        checkout = read_checkout(git)
        remote = Remote.parse(checkout.remote_url, self.directory)
        clone = clone_of(remote, self.git_identity_file, self.oauth_token)
        diff = take_diff(git, checkout.commit) if with_upload else None
        return Code.of_git(remote.name, remote.location, checkout.branch, checkout.commit, clone, diff)


def check_directory(repo_dir: str | os.PathLike[str]) -> Path:
    """Return the directory with ``~`` expanded, or raise ``ConfigurationError`` when it is none."""
    path = Path(repo_dir).expanduser().resolve()
    if not path.is_dir():
        raise ConfigurationError(f"repo_dir: {os.fspath(repo_dir)!r} is no directory")
    return path
