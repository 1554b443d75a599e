"""Copy bytes between SSH channels and sockets."""

from __future__ import annotations

import contextlib
import socket
import threading

import paramiko

# Bytes to copy at once: two of the 32 KB packets that paramiko sends by default.
_COPY_BYTES = 65536

Pipe = paramiko.Channel | socket.socket


def join_in_background(one: Pipe, other: Pipe) -> None:
    """Copy in both directions until both sides have sent everything, then close both."""
    threading.Thread(target=_join, args=(one, other), daemon=True).start()


def _join(one: Pipe, other: Pipe) -> None:
    backwards = threading.Thread(target=_copy, args=(other, one), daemon=True)
    backwards.start()
    _copy(one, other)
    backwards.join()
    for pipe in (one, other):
        with contextlib.suppress(OSError, EOFError):
            pipe.close()


def _copy(source: Pipe, target: Pipe) -> None:
    # The other side may have closed already, which paramiko reports with an EOFError.
    with contextlib.suppress(OSError, EOFError):
        while data := source.recv(_COPY_BYTES):
            target.sendall(data)
    with contextlib.suppress(OSError, EOFError):
        target.shutdown(socket.SHUT_WR)
