"""Describe the code and the files a run starts from (PROTOCOL 1.3)."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstack_core._wire.versions import Release
from dstack_core.errors import ConfigurationError

# Servers before it require ``repo_creds.protocol``; those of today refuse it as an unknown key.
_FIRST_WITHOUT_PROTOCOL: Release = (0, 19, 0)
_DIGITS = string.digits + string.ascii_lowercase


@dataclass(frozen=True, slots=True)
class Upload:
    """Bytes that are uploaded under their sha256.

    The error for an upload that the server finds too big shows ``what``, the parameter and its value,
    ``way_out``, an advice how to make it smaller, and ``biggest``, its biggest files with their bytes.
    """

    what: str
    way_out: str
    data: bytes = field(repr=False)
    sha256: str
    biggest: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, what: str, way_out: str, data: bytes, sizes: Iterable[tuple[str, int]]) -> Upload:
        """Return the upload of ``data``; ``sizes`` are the files in it with their bytes."""
        return cls(what, way_out, data, hashlib.sha256(data).hexdigest(), biggest_of(sizes))

    def too_big(self, reason: str) -> ConfigurationError:
        """Return the error for an upload that the server refused for ``reason``."""
        return too_big(self.what, len(self.data), self.biggest, reason, self.way_out)


@dataclass(frozen=True, slots=True)
class Clone:
    """The way a run clones its repository; the secrets stay out of every repr."""

    url: str
    private_key: str | None = field(default=None, repr=False)
    oauth_token: str | None = field(default=None, repr=False)

    @property
    def has_secret(self) -> bool:
        """Whether there are credentials that a server could lack."""
        return self.private_key is not None or self.oauth_token is not None


@dataclass(frozen=True, slots=True)
class StoredRepo:
    """A server's record of a repository for the token's user, without the secrets themselves."""

    has_clone: bool
    has_secret: bool

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> StoredRepo:
        """Read a reply to ``repos/get``."""
        clone = data.get("repo_creds") or {}
        return cls(bool(clone), bool(clone.get("private_key") or clone.get("oauth_token")))


@dataclass(frozen=True, slots=True)
class RepoPlace:
    """The place of the code that ``repos`` of a configuration asks for; ``source`` is in the server's form.

    Without a place the code lies in ``/workflow``, whatever the server.
    """

    source: Mapping[str, str]
    path: str = "."
    if_exists: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """What not every server has: before 0.20 the code always lies in ``/workflow``."""
        is_default = self.path in (".", "/workflow") and self.if_exists is None
        return () if is_default else ("repos with path or if_exists",)


@dataclass(frozen=True, slots=True)
class Code:
    """The code of a run: its description for the server, how it is cloned, what is uploaded."""

    repo_id: str
    info: Mapping[str, Any]
    data: Mapping[str, Any]
    clone: Clone | None = None
    upload: Upload | None = None
    place: RepoPlace | None = None

    @classmethod
    def of_directory(cls, directory: str, upload: Upload | None) -> Code:
        """Describe a directory that is uploaded as an archive."""
        data = {"repo_type": "local", "repo_dir": directory}
        return cls(_repo_id(directory.rpartition("/")[2], directory), data, data, None, upload)

    @classmethod
    def of_git(
        cls,
        name: str,
        location: str,
        branch: str | None,
        commit: str | None,
        clone: Clone,
        upload: Upload | None,
        author: Mapping[str, str] | None = None,
    ) -> Code:
        """Describe a commit of a git repository, with a diff on top; ``location`` identifies the repository.

        ``author`` is the author of commits made in the run: ``name`` and ``email``, each where it is known.
        """
        info = {"repo_type": "remote", "repo_name": name}
        place = {"repo_branch": branch, "repo_hash": commit}
        place |= {f"repo_config_{key}": value for key, value in (author or {}).items()}
        data = info | {key: value for key, value in place.items() if value is not None}
        return cls(_repo_id(name, location), info, data, clone, upload)

    def init_body(self, release: Release | None) -> dict[str, Any]:
        """Return the body of ``repos/init``; servers before 0.19 want a clone's protocol (PROTOCOL 1.3)."""
        with_protocol = release is not None and release < _FIRST_WITHOUT_PROTOCOL
        body: dict[str, Any] = {"repo_id": self.repo_id, "repo_info": self.info}
        if self.clone is not None:
            credentials = {
                "clone_url": self.clone.url,
                "private_key": self.clone.private_key,
                "oauth_token": self.clone.oauth_token,
                "protocol": _protocol(self.clone.url) if with_protocol else None,
            }
            body["repo_creds"] = {key: value for key, value in credentials.items() if value is not None}
        return body


def biggest_of(sizes: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Return the five biggest of some files."""
    return tuple(sorted(sizes, key=lambda item: -item[1])[:5])


def too_big(
    what: str, size: int, biggest: tuple[tuple[str, int], ...], reason: str, way_out: str
) -> ConfigurationError:
    """Return the error for an upload of ``size`` bytes that is too big; ``reason`` follows the size."""
    files = ", ".join(f"{name} ({bytes_ / 1e6:.1f} MB)" for name, bytes_ in biggest)
    return ConfigurationError(
        f"{what} is too big to upload: {size / 1e6:.1f} MB ({reason}). Its biggest files: {files}. {way_out}"
    )


def _protocol(url: str) -> str:
    return "ssh" if url.startswith("ssh://") else "https"


def _repo_id(name: str, location: str) -> str:
    """Return the id that dstack's own client gives a repository, in all supported versions."""
    number = int.from_bytes(hashlib.sha256(location.encode()).digest(), "little")
    # Of the lowest 32 digits in base 36, the first eight. The server takes any id, but with dstack's own the
    # credentials that a user stored with ``dstack init`` count (PROTOCOL 1.3).
    return f"{name}-" + "".join(_DIGITS[number // 36**place % 36] for place in range(31, 23, -1))
