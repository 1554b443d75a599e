"""The address of a Git remote, read as dstack's own client does (PROTOCOL 1.3).

The id of a repository is made from its host and path, so both have to come out the same: then what
``dstack init`` stored counts here, and the reverse. An ssh host may be an alias of ``~/.ssh/config``. It is
resolved with paramiko's reader, as dstack does, and because a worker may have no ``ssh`` program. paramiko is
imported only for an ssh address on a machine that has that file.
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit

from dstack_core._attach.extra import INSTALL

_log = logging.getLogger("dstack_core")
_SCP = re.compile(r"(?:(?P<user>[^/@:]+)@)?(?P<host>\[[^\]]+\]|[^/@:]+):(?P<path>.+)")
_SSH_CONFIG = "~/.ssh/config"
# What the path of an address may hold unquoted. A percent sign belongs to what is quoted already.
_SAFE = "/%:@!$&'()*+,;=~"


class CannotCloneError(Exception):
    """A checkout that a run cannot clone; the text is the reason, a clause without a full stop."""


@dataclass(frozen=True, slots=True)
class SshHost:
    """The settings of a host in the SSH configuration."""

    host: str | None = None
    user: str | None = None
    port: int | None = None

    @classmethod
    def configured(cls, host: str) -> Self:
        """Look the host up in ``~/.ssh/config``; without that file nothing is set."""
        path = Path(_SSH_CONFIG).expanduser()
        if not path.is_file():
            return cls()
        try:
            from paramiko import SSHConfig, SSHException
        except ImportError:
            _warn_of_alias(path, host)
            return cls()
        try:
            found = SSHConfig.from_path(str(path)).lookup(host)
            port = int(found["port"]) if "port" in found else None
        except (OSError, ValueError, SSHException) as error:
            _log.warning("Could not read %s: %s. Using %s unchanged.", path, error, host)
            return cls()
        return cls(found.get("hostname"), found.get("user"), port)


@dataclass(frozen=True, slots=True)
class Remote:
    """The address of a remote without the secrets that were written into it.

    ``user`` is the login of an ssh address, and ``host`` the name behind its alias. What stands before the
    ``@`` of an https address may be a token, so it is dropped and never used.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    user: str | None = None

    @classmethod
    def parse(cls, url: str, directory: Path) -> Self:
        """Read any form that git accepts; a path is relative to ``directory``; or ``CannotCloneError``."""
        scheme, separator, _ = url.partition("://")
        if not separator:
            # git's own rule: what begins like a path is one, even with a colon in it.
            scp = _SCP.fullmatch(url)
            if scp is None or url.startswith((".", "/")):
                place = (directory / Path(url).expanduser()).resolve()
                return cls("file", "", None, quote(str(place), safe="/"))
            return cls._over_ssh(scp["host"], None, "/" + scp["path"], scp["user"])
        scheme = scheme.lower()
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise CannotCloneError("the address of its remote cannot be read") from None
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        if scheme == "ssh":
            return cls._over_ssh(host, port, parts.path, parts.username)
        if scheme == "file":
            return cls("file", "", None, parts.path)
        if scheme in ("https", "git"):
            return cls("https", host, port if scheme == "https" else None, parts.path)
        raise CannotCloneError(
            f"its remote is reached over {scheme}, and a run clones over https and ssh only"
        )

    @classmethod
    def _over_ssh(cls, host: str, port: int | None, path: str, user: str | None) -> Self:
        configured = SshHost.configured(host)
        return cls("ssh", configured.host or host, port or configured.port, path, user or configured.user)

    @property
    def name(self) -> str:
        """The repository's name."""
        return self._clean_path.rpartition("/")[2] or "unknown"

    @property
    def location(self) -> str:
        """Host and path, which are the same in all addresses of one repository."""
        return self.host.lower() + self._clean_path

    @property
    def directory(self) -> Path:
        """The directory of a local address."""
        return Path(unquote(self.path))

    @property
    def _clean_path(self) -> str:
        return (quote(self.path, safe=_SAFE) or "/").rstrip("/").removesuffix(".git")

    def as_https(self) -> str:
        """Return the address over https; a port counts only if it was given with https."""
        port = f":{self.port}" if self.port and self.scheme == "https" else ""
        return f"https://{self.host.lower()}{port}{self._absolute_path}"

    def as_ssh(self) -> str:
        """Return the address over ssh, with user and port as given, else as configured."""
        user, port = self.user, self.port
        if self.scheme != "ssh":
            configured = SshHost.configured(self.host)
            user, port = configured.user, configured.port
        shown = f":{port}" if port else ""
        return f"ssh://{user or 'git'}@{self.host.lower()}{shown}{self._absolute_path}"

    @property
    def _absolute_path(self) -> str:
        return "/" + quote(self.path, safe=_SAFE).lstrip("/")


def _warn_of_alias(path: Path, host: str) -> None:
    # A host that only a pattern such as "*" fits keeps its name, as a rule.
    with contextlib.suppress(OSError, UnicodeError):
        for line in path.read_text().splitlines():
            keyword, *names = line.replace("=", " ").split() or [""]
            if keyword.lower() == "host" and host in names:
                _log.warning(
                    "%s has settings for %s, and paramiko, which reads them, is not installed. Using %s "
                    "unchanged. Run: %s",
                    path,
                    host,
                    host,
                    INSTALL,
                )
                return
