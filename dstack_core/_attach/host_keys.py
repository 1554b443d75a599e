"""The check of the key that a host shows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core._wire.attach import Hop
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    import paramiko

_DEFAULT_PORT = 22


class HostKeyError(AttachError):
    """A host key that differs from the known one; trying again would not help."""


class HostKeys:
    """The key that each hop showed first, with which all later ones are compared.

    A hop with ``check_host_key`` (the server's SSH proxy) is also compared with ``~/.ssh/known_hosts``. For
    the others there is nothing to compare the first key with, because the server hands out no host keys.
    Source: PROTOCOL 4.4.
    """

    def __init__(self, known_hosts: Path | None = None) -> None:
        self._known_hosts = known_hosts
        self._seen: dict[Hop, str] = {}

    def expected_types(self, hop: Hop) -> list[str]:
        """Return the types of the keys known for the hop, to be requested before others."""
        return [key.get_name() for key in self._known(hop)]

    def check(self, hop: Hop, key: paramiko.PKey) -> None:
        """Accept the hop's key, or raise ``HostKeyError``."""
        known = self._known(hop)
        shown = f"{hop}: its host key ({key.get_name()} {key.fingerprint}) differs from the one"
        if known and key not in known:
            raise HostKeyError(
                f"{shown} in {self._file()}. The connection may be intercepted. If the host's key was "
                "changed on "
                f"purpose, remove the old one: ssh-keygen -R '{_known_name(hop)}'"
            )
        # A machine that answers at the same address after a reconnect must be the same machine.
        if self._seen.setdefault(hop, key.get_base64()) != key.get_base64():
            raise HostKeyError(
                f"{shown} before the connection was lost. If you expected that, detach and attach again."
            )

    def _known(self, hop: Hop) -> list[paramiko.PKey]:
        if not hop.check_host_key:
            return []
        entry = _read(self._file()).lookup(_known_name(hop))
        return [] if entry is None else list(entry.values())

    def _file(self) -> Path:
        return self._known_hosts or Path.home() / ".ssh" / "known_hosts"


def _read(file: Path) -> paramiko.HostKeys:
    """Return the keys of a file, without lines that cannot be read."""
    import paramiko
    from paramiko.hostkeys import HostKeyEntry, InvalidHostKey

    # Line by line: paramiko's own reader gives up the whole file at some broken lines.
    keys = paramiko.HostKeys()
    with contextlib.suppress(OSError):
        for line in file.read_text(errors="replace").splitlines():
            with contextlib.suppress(paramiko.SSHException, InvalidHostKey):
                entry = None if line.startswith("#") else HostKeyEntry.from_line(line)
                if entry is not None:
                    for name in entry.hostnames or ():
                        keys.add(name, entry.key.get_name(), entry.key)
    return keys


def _known_name(hop: Hop) -> str:
    # The form that OpenSSH writes into the file.
    return hop.hostname if hop.port == _DEFAULT_PORT else f"[{hop.hostname}]:{hop.port}"
