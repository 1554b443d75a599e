"""Binding local ports, and finding out which process has one that is taken."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Mapping

from dstack_core._attach.extra import INSTALL
from dstack_core.errors import ConfigurationError, PortInUseError

_ADDRESS = "127.0.0.1"
_HIGHEST = 65535
_REFUSED = frozenset({errno.EACCES, errno.EPERM})


def verify_ports(ports: Mapping[int, int]) -> None:
    """Bind every local port and release it again; raises as ``bind`` does.

    ``ports`` maps each local port to the container's port.
    """
    with contextlib.ExitStack() as bound:
        for port, container_port in ports.items():
            bound.enter_context(bind(port, container_port))


def bind(port: int, container_port: int) -> socket.socket:
    """Return a socket that listens on 127.0.0.1 for a port of the container; port 0 is any free one.

    Raises ``PortInUseError`` if another process has the port, ``ConfigurationError`` if this user may not
    bind it.
    """
    try:
        return socket.create_server((_ADDRESS, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(port, container_port) from None
        if error.errno in _REFUSED:
            raise ConfigurationError(
                f"ports: expected a local port that this user may bind, got {port} (ports below 1024 belong "
                f"to the system). {_ways_out(port, container_port)}"
            ) from None
        raise


def bind_from(port: int) -> socket.socket:
    """Return a socket that listens on ``port``, else on the next free one above it (PROTOCOL 4.5)."""
    for candidate in range(port, _HIGHEST + 1):
        try:
            return socket.create_server((_ADDRESS, candidate))
        except OSError as error:
            if error.errno != errno.EADDRINUSE and error.errno not in _REFUSED:
                raise
    return bind(0, port)


def _in_use(port: int, container_port: int) -> PortInUseError:
    pid, owner = _owner(port)
    return PortInUseError(
        f"ports: the local port {port} is taken by {owner}. {_ways_out(port, container_port)}",
        port=port,
        pid=pid,
    )


def _ways_out(port: int, container_port: int) -> str:
    # Below 1024 the usual habit, such as 8080 for 80; above it a neighbour.
    other = port + 8000 if port < 1024 else port + 1 if port < _HIGHEST else port - 1
    return (
        f'Choose another local port, such as "{other}:{container_port}", or any free one with '
        f'"*:{container_port}". If you will not attach to the run, pass verify_ports=False to submit().'
    )


def _owner(port: int) -> tuple[int | None, str]:
    """Return the id of the process that listens on a port, None if this user cannot see it, and its name."""
    unseen = "a process that this user cannot see (another user's)"
    try:
        import psutil
    except ImportError:
        return None, f"another process ({INSTALL} lets this error name it)"
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None, unseen
    pids = [
        connection.pid
        for connection in connections
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    ]
    pid = next((pid for pid in pids if pid is not None), None)
    if pid is None:
        return None, unseen
    if pid == os.getpid():
        return pid, f"this very process ({pid}), perhaps by another attached run"
    try:
        return pid, f"process {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return pid, f"process {pid}"
