"""Binding local ports, and finding out which process has one that is taken."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

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
    """Return the id of the process that listens on a port, None if it is not known, and its name."""
    try:
        import psutil
    except ImportError:
        return None, f"another process ({INSTALL} lets this error name it)"
    try:
        pids = [connection.pid for connection in _listening(psutil.net_connections("tcp"), port)]
    except (psutil.Error, OSError):
        # macOS lists the connections of all processes for root alone, but those of a user's own processes.
        pids = _own_listeners(port)
        if not pids:
            return None, "another process; this system shows whose only to its administrator"
    pid = next((pid for pid in pids if pid is not None), None)
    if pid is None and pids:
        return None, "a process that this user cannot see (another user's, or in another container)"
    if pid is None:
        # Nothing listens: the socket is bound only, or it was closed a moment ago.
        return None, "another socket of this machine, whose process is not known"
    if pid == os.getpid():
        return pid, f"this very process ({pid}), perhaps by another attached run"
    try:
        return pid, f"process {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return pid, f"process {pid}"


def _own_listeners(port: int) -> list[int | None]:
    """Return the ids of the processes that listen on a port, among those that show their sockets."""
    import psutil

    found: list[int | None] = []
    for process in psutil.process_iter():
        # Before psutil 6 the method has another name.
        connections = getattr(process, "net_connections", None) or process.connections
        with contextlib.suppress(psutil.Error, OSError):
            if _listening(connections("tcp"), port):
                found.append(process.pid)
    return found


def _listening(connections: Iterable[Any], port: int) -> list[Any]:
    return [
        each for each in connections if each.status == "LISTEN" and each.laddr and each.laddr.port == port
    ]
