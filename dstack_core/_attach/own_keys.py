"""The user's own SSH keys: the agent's, and the files ``ssh`` would try."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core._attach.keys import load_private_key

if TYPE_CHECKING:
    import paramiko

_DEFAULT_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


@contextlib.contextmanager
def own_keys(hostname: str) -> Generator[list[paramiko.PKey], None, None]:
    """Yield the keys of the files that ``~/.ssh/config`` names for a host, then the agent's.

    Without such a file: the agent's, then the default files. Keys that are missing, encrypted or of an
    unknown type are left out. Nothing is changed.
    """
    import paramiko

    named = _named_files(hostname)
    with contextlib.ExitStack() as held:
        # The agent stays connected while its keys are used: it signs with them, they never leave it.
        loaded: list[paramiko.PKey] = []
        with contextlib.suppress(OSError, paramiko.SSHException):
            loaded += held.enter_context(contextlib.closing(paramiko.Agent())).get_keys()
        if named:
            yield _load(named) + loaded
        else:
            yield loaded + _load([Path.home() / ".ssh" / name for name in _DEFAULT_NAMES])


def _load(paths: list[Path]) -> list[paramiko.PKey]:
    keys = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            keys.append(load_private_key(path.read_bytes()))
    return keys


def _named_files(hostname: str) -> list[Path]:
    import paramiko

    try:
        config = paramiko.SSHConfig.from_path(str(Path.home() / ".ssh" / "config"))
        found: str | list[str] = config.lookup(hostname).get("identityfile", [])
    except (OSError, paramiko.SSHException):
        return []
    names = [found] if isinstance(found, str) else found
    return [Path(name).expanduser() for name in names]
