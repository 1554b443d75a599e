"""Ports for the tests of every package."""

from __future__ import annotations

import secrets
import socket

# Below the ports that Linux (from 32768) and macOS (from 49152) give to connections, so that no connection takes one.
_PORTS = range(20000, 32000)


def free_port() -> int:
    """Return a port of this machine that nothing listens on and that no connection is given by chance later."""
    while True:
        port = secrets.choice(_PORTS)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
