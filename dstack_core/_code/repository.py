"""The repository parameters of a client, and the code that its runs start from.

Code travels in one of two ways. A run clones a Git checkout and applies a diff; this is small, keeps the
history, and needs a remote that the run can reach. Everything else is uploaded as an archive: a plain
directory, any directory with ``local_repo``, and a checkout for which ``CannotCloneError`` was raised on the
way; the log then names the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dstack_core._code.archive import pack_directory
from dstack_core._code.credentials import GitCredentials, clone_of
from dstack_core._code.diff import take_diff
from dstack_core._code.git import Git, is_top_of_repository, read_checkout
from dstack_core._code.remote import CannotCloneError, Remote
from dstack_core._wire.code import Code, RepoPlace
from dstack_core.errors import ConfigurationError
from dstack_core.models.repos import RepoMapping

_log = logging.getLogger("dstack_core")


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository parameters of ``from_config``; secrets stay out of the repr.

    ``init`` (bool): submitting registers the repository with the server.
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
        """Return the checked parameters; starts no process and sends nothing.

        Parameters are those of ``from_config``. Raises ``ConfigurationError`` for a directory or a file that
        does not exist, and for two credentials.
        """
        credentials = GitCredentials.checked(git_identity_file, oauth_token, git_private_key)
        directory = None if repo_dir is None else check_directory(repo_dir)
        return cls(directory, local_repo, credentials, init)

    def describe(self) -> Code:
        """Return what is registered with the server. Runs git; raises ``ConfigurationError``."""
        if self.directory is None:
            raise ConfigurationError(
                "repo_dir: expected a directory, got none. Pass from_config(repo_dir=...) to use "
                "client.repos."
            )
        return self._code(self.directory, with_upload=False)

    def pack(self, repos: Sequence[RepoMapping | Mapping[str, str] | str] = ()) -> Code | None:
        """Return the code that a run starts from, with its diff or its archive; None without code.

        ``repos`` are those of the run's configuration. Runs git and reads the files; raises
        ``ConfigurationError``.
        """
        if not repos:
            if self.directory is not None:
                return self._code(self.directory, with_upload=True)
            unused = self.credentials.parameter
            if unused is not None:
                _log.warning(
                    "%s: the client has no repo_dir and the configuration no repos, so it is not used.",
                    unused,
                )
            return None
        if self.directory is not None:
            raise ConfigurationError(
                f"repos: expected either repos or repo_dir, got both (repo_dir: {str(self.directory)!r}). "
                "Remove one of them."
            )
        try:
            # A run starts from one repository; the configuration refuses more.
            return self._named(RepoMapping.model_validate(repos[0]))
        except ConfigurationError as error:
            raise ConfigurationError(f"repos: {error.message.removeprefix('repo_dir: ')}") from None

    def _named(self, repo: RepoMapping) -> Code:
        if repo.local_path is not None:
            if repo.branch or repo.hash:
                _log.warning("repos: branch and hash are not used with a local_path.")
            directory = check_directory(repo.local_path)
            place = RepoPlace({"local_path": str(directory)}, repo.path, repo.if_exists)
            return replace(self._code(directory, with_upload=True), place=place)
        try:
            remote = Remote.parse(repo.url or "", Path.cwd())
        except CannotCloneError as error:
            raise _not_cloned(str(error)) from None
        if remote.scheme == "file":
            raise _not_cloned("its remote is a local path")
        clone = clone_of(remote, self.credentials)
        code = Code.of_git(remote.name, remote.location, repo.branch, repo.hash, clone, None)
        named = {"url": clone.url, "branch": repo.branch, "hash": repo.hash}
        source = {key: value for key, value in named.items() if value is not None}
        return replace(code, place=RepoPlace(source, repo.path, repo.if_exists))

    def _code(self, directory: Path, *, with_upload: bool) -> Code:
        if self.local_repo:
            return _contents(directory, with_upload=with_upload)
        git = Git(directory)
        try:
            if not is_top_of_repository(directory):
                return _contents(directory, with_upload=with_upload)
            checkout = read_checkout(git)
            # Also without an upload: a change that no diff can carry decides how the code travels.
            diff = take_diff(git, checkout.commit)
        except CannotCloneError as error:
            return _instead_of_clone(git, str(error), with_upload=with_upload)
        remote = checkout.remote
        clone = clone_of(remote, self.credentials)
        return Code.of_git(
            remote.name,
            remote.location,
            checkout.branch,
            checkout.commit,
            clone,
            diff if with_upload else None,
            checkout.author,
        )


def _contents(directory: Path, *, with_upload: bool) -> Code:
    return Code.of_directory(str(directory), pack_directory(directory) if with_upload else None)


def _instead_of_clone(git: Git, reason: str, *, with_upload: bool) -> Code:
    """Return the files of a checkout that a run cannot clone, without ``.git``, and log the reason."""
    directory = str(git.directory)
    if not with_upload:
        return Code.of_directory(directory, None)
    way_out = f"Name what the run does not need in .dstackignore. It cannot be cloned instead: {reason}"
    upload = pack_directory(git.directory, git.tracked(), way_out)
    _log.warning(
        "repo_dir: uploading the files of %s (%.1f MB) instead of cloning, because %s. "
        "Pass local_repo=True to upload without this message.",
        directory,
        len(upload.data) / 1e6,
        reason,
    )
    return Code.of_directory(directory, upload)


def _not_cloned(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"url: expected a repository that a run can clone, but {reason}. Give an https or ssh address."
    )


def check_directory(repo_dir: str | os.PathLike[str]) -> Path:
    """Return the directory with ``~`` expanded. Raises ``ConfigurationError`` if it is not a directory."""
    path = Path(repo_dir).expanduser().resolve()
    if not path.is_dir():
        raise ConfigurationError(f"repo_dir: expected a directory, got {os.fspath(repo_dir)!r}.")
    return path
