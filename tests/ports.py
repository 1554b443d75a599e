"""Ports for the tests of every package."""

from __future__ import annotations

import secrets
import socket

# Below the ports that Linux (from 32768) and macOS (from 49152) assign to connections, so no connection takes one.
_PORTS = range(20000, 32000)


def free_port() -> int:
    """Return a free port of this machine that no later connection gets by chance."""
    while True:
        port = secrets.choice(_PORTS)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
