"""A digest of the local code and files that a run gets, by which an engine caches results.

The archive of a run has a hash too, but that one changes with the times of the files: a new checkout of the
same commit would be other content. Here count only the names of the files, what is in them, and whether they
may be executed. Files are read in pieces, so that a large one does not fill the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core._code.links import Member
    from dstack_core.models.configurations import Configuration


def code_digest(configuration: Configuration, repo_dir: Path | None = None) -> str | None:
    """Return a digest of what a run gets from this machine, None if it gets nothing.

    These are the ``files`` of its configuration, a local directory in its ``repos``, and ``repo_dir``; ignore
    files count as for a submission. Paths do not count, except for those in the container.

    Args:
        configuration: The checked configuration.
        repo_dir: The directory whose contents the run gets, or None.

    Returns:
        64 hexadecimal digits, or None.

    Raises:
        ConfigurationError: A file or a directory does not exist or cannot be read.
    """
    # Only what is cached pays for these imports.
    from dstack_core._code.git import Git
    from dstack_core._code.ignored import walk
    from dstack_core._code.links import EntryLinks, Member
    from dstack_core._code.repository import check_directory
    from dstack_core.models.files import FileMapping
    from dstack_core.models.repos import RepoMapping

    digest = hashlib.sha256()
    repos = [RepoMapping.model_validate(repo).local_path for repo in configuration.repos or []]
    files = [FileMapping.model_validate(file) for file in configuration.files or []]
    folders = [check_directory(path) for path in (*repos, repo_dir) if path is not None]
    for folder in folders:
        tracked = Git(folder).tracked() if (folder / ".git").exists() else ()
        found = (Member(path, path.relative_to(folder).as_posix()) for path in walk(folder, tracked))
        _add(digest, f"repo_dir: {str(folder)!r}", "code", found)
    for entry in files:
        what = f"files: {entry.local_path!r}"
        links = EntryLinks(what)
        path = links.real_path(Path(entry.local_path).expanduser())
        if not path.exists():
            raise ConfigurationError(f"{what}: expected a file or directory, got none at {path}.")
        members = links.members(path, path.name) if path.is_dir() else [Member(path, path.name)]
        _add(digest, what, f"file {entry.path}", members)
    return digest.hexdigest() if folders or files else None


def _add(digest: hashlib._Hash, what: str, kind: str, members: Iterable[Member]) -> None:
    """Add the files under one heading, each with the digest of its own content."""
    digest.update(f"{kind}\0".encode())
    try:
        for member in members:
            if member.link is None and member.path.is_dir() and not member.path.is_symlink():
                continue
            digest.update(f"{member.name}\0{_content(member)}\0".encode(errors="surrogateescape"))
    except OSError as error:
        raise ConfigurationError(f"{what}: {error.filename}: {error.strerror}.") from None


def _content(member: Member) -> str:
    if member.link is not None or member.path.is_symlink():
        return f"link {member.link or member.path.readlink()}"
    with member.path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{'x' if member.path.stat().st_mode & 0o100 else '-'} {content}"
