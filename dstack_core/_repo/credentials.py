"""Say how a run clones a repository, and with which secret (PROTOCOL 1.3, 3.1)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from dstack_core._repo.git import LOCAL_REPO
from dstack_core._ssh.key_formats import EncryptedKeyError, load_private_key
from dstack_core._wire.code import Clone
from dstack_core.errors import ConfigurationError

_SCP = re.compile(r"(?:(?P<user>[^/@:]+)@)?(?P<host>\[[^\]]+\]|[^/@:]+):(?P<path>.+)")


@dataclass(frozen=True, slots=True)
class Remote:
    """Hold the address of a remote without the secrets that were written into it.

    ``user`` is the login of an ssh address. What stands before the ``@`` of an https address may be a
    token, so it is dropped and never used.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    user: str = "git"

    @classmethod
    def parse(cls, url: str, directory: Path) -> Remote:
        """Read any form git takes; a path is relative to ``directory``. Raises ``ConfigurationError``."""
        scheme, separator, _ = url.partition("://")
        if not separator:
            scp = _SCP.fullmatch(url)
            if scp and not url.startswith((".", "/")):
                return cls("ssh", scp["host"], None, "/" + scp["path"].lstrip("/"), scp["user"] or "git")
            return cls("file", "", None, quote(str((directory / Path(url).expanduser()).resolve())))
        scheme = scheme.lower()
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigurationError(
                f"repo_dir: the address of the Git remote cannot be read. {_ways()}"
            ) from None
        if scheme not in ("https", "ssh", "file", "git"):
            raise ConfigurationError(
                f"repo_dir: a run cannot clone a Git remote over {scheme!r}, only over https and ssh. "
                f"{_ways()}"
            )
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        user = (parts.username if scheme == "ssh" else None) or "git"
        return cls("https" if scheme == "git" else scheme, host, port, parts.path, user)

    @property
    def name(self) -> str:
        """Return the repository's name."""
        return self._clean_path.rpartition("/")[2] or "repo"

    @property
    def location(self) -> str:
        """Return what is the same for all addresses of one repository."""
        return self.host.lower() + self._clean_path

    @property
    def _clean_path(self) -> str:
        return self.path.rstrip("/").removesuffix(".git")

    def as_url(self, scheme: str) -> str:
        """Return the address over https, ssh or file; a port only counts for the scheme it was given with."""
        port = f":{self.port}" if self.port and scheme == self.scheme else ""
        user = f"{self.user}@" if scheme == "ssh" else ""
        return f"{scheme}://{user}{self.host}{port}{self.path}"


def clone_of(remote: Remote, identity_file: Path | None, oauth_token: str | None) -> Clone:
    """Return how the run clones: over ssh with a key, over https with a token, over https without either.

    Raises ``ConfigurationError`` for a key that cannot be used, and for a remote that is a local path.
    """
    if identity_file is None and oauth_token is None:
        return Clone(remote.as_url("file" if remote.scheme == "file" else "https"))
    field = "oauth_token" if identity_file is None else "git_identity_file"
    if remote.scheme == "file":
        raise ConfigurationError(
            f"{field}: the Git remote is the local path {remote.path!r}, which takes none"
        )
    if identity_file is not None:
        return Clone(remote.as_url("ssh"), private_key=read_private_key(identity_file))
    return Clone(remote.as_url("https"), oauth_token=oauth_token)


def check_identity(git_identity_file: str | os.PathLike[str] | None, oauth_token: str | None) -> Path | None:
    """Return the key file's path with ``~`` expanded; raises ``ConfigurationError`` for what cannot be."""
    if not git_identity_file:
        return None
    if oauth_token:
        raise ConfigurationError("git_identity_file and oauth_token exclude each other; drop one of the two")
    path = Path(git_identity_file).expanduser()
    if not path.is_file():
        raise ConfigurationError(f"git_identity_file: there is no file {str(path)!r}")
    return path


def read_private_key(path: Path) -> str:
    """Return the text of an unencrypted private key; raises ``ConfigurationError`` for anything else."""
    try:
        text = path.read_text()
        load_private_key(text.encode())
    except OSError as error:
        raise ConfigurationError(f"git_identity_file: {str(path)!r}: {error.strerror}") from None
    except EncryptedKeyError:
        raise ConfigurationError(
            f"git_identity_file: the key in {str(path)!r} is encrypted, and a run has nobody to ask for its "
            "passphrase; use a key without one, such as a deploy key"
        ) from None
    except ValueError:
        raise ConfigurationError(f"git_identity_file: {str(path)!r} holds no private key") from None
    return text if text.endswith("\n") else text + "\n"


def _ways() -> str:
    return f"Give the remote an https or ssh address (git remote set-url), or {LOCAL_REPO}"
