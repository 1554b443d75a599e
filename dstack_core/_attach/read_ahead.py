"""Take all that has come at once from below an SSH connection, which asks for it in small bites."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import paramiko

_GULP = 256 * 1024


def gulping(below: socket.socket | paramiko.Channel) -> socket.socket:
    """Return what ``paramiko.Transport`` takes for its socket."""
    return cast("socket.socket", _Gulps(below))


class _Gulps:
    """Read ahead; all else goes straight through.

    paramiko asks for the head of a packet and then for the rest. Each would cost a call of the system, or,
    from a channel of another connection, a move of all that waits there.
    """

    def __init__(self, below: socket.socket | paramiko.Channel) -> None:
        self._below = below
        self._held = b""
        self._taken = 0

    def recv(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end."""
        if self._taken == len(self._held):
            self._held, self._taken = self._below.recv(_GULP), 0
        start = self._taken
        self._taken = min(start + size, len(self._held))
        return self._held[start : self._taken]

    def close(self) -> None:
        """Hang up; a connection that is gone already is none to say goodbye to."""
        with contextlib.suppress(OSError, EOFError):
            self._below.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)
