"""A read-ahead buffer below an SSH connection, which asks for its bytes in small pieces.

paramiko reads the head of each packet and then its body. Below the first hop each read is a system call;
below the others it is a read from a channel of the hop before, which moves all the bytes that are waiting
there, so its cost grows with what has arrived. With this buffer, one read takes everything that has arrived.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import paramiko

# Most bytes taken at once: several SSH packets of 32 KiB. Less brings back the cost of single reads; more
# only holds memory, up to a channel's window of 2 MiB.
_AHEAD = 256 * 1024


def reading_ahead(below: socket.socket | paramiko.Channel) -> socket.socket:
    """Return what ``paramiko.Transport`` takes for its socket: ``below`` with a read-ahead buffer."""
    return cast("socket.socket", _ReadAhead(below))


class _ReadAhead:
    """A connection with a read-ahead buffer; everything but ``recv`` and ``close`` is passed through."""

    def __init__(self, below: socket.socket | paramiko.Channel) -> None:
        self._below = below
        self._held = b""
        self._taken = 0

    def recv(self, size: int) -> bytes:
        """Return up to ``size`` bytes, ``b""`` at the end."""
        # An index instead of cutting the buffer: a cut would copy what is left at every read.
        if self._taken == len(self._held):
            self._held, self._taken = self._below.recv(_AHEAD), 0
        start = self._taken
        self._taken = min(start + size, len(self._held))
        return self._held[start : self._taken]

    def close(self) -> None:
        """Close the connection; one that is gone already is fine."""
        with contextlib.suppress(OSError, EOFError):
            self._below.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)
