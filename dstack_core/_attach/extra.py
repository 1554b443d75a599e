"""The packages of the extra ``attach``, which a client that never attaches does without."""

from __future__ import annotations

from importlib.util import find_spec

from dstack_core.errors import ConfigurationError

INSTALL = 'pip install "dstack-core[attach]"'
# psutil is in the extra, too; without it only the name of a process that has a port is missing.
_NEEDED = ("cryptography", "paramiko", "websockets")


def missing_packages() -> list[str]:
    """Return the packages that attaching needs and that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def require_packages(subject: str, *, otherwise: str = "") -> None:
    """Raise ``ConfigurationError`` if attaching is not installed.

    ``subject`` is what the caller asked for, ``otherwise`` a sentence on how to do without.
    """
    missing = missing_packages()
    if missing:
        raise ConfigurationError(
            f"{subject}: expected the packages of the extra attach, got none of {', '.join(missing)}. "
            f"Run: {INSTALL}{otherwise}"
        )
