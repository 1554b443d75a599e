"""SSH access to jobs, for clients that attach: ports, the live log and a shell (PROTOCOL 4).

As on a host of an SSH fleet there are two logins: one on the host and, through it, one on the "container",
which has a port of its own. A client opens a channel to that port and runs a second SSH connection in it.

Only the host's port is a real one. A container's port is just a number that identifies the job, so hundreds
of finished jobs, whose logs a client may still want, need no socket. `SshHost.serve` serves both kinds of
connections: with a `Door` it is the container of that job, without one the host. Each connection and each
channel has a thread. paramiko is imported with the first connection, because few servers get any.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import paramiko

ADDRESS = "127.0.0.1"
# The port of the runner's API in a container (PROTOCOL 4.5).
RUNNER_PORT = 10999
# The numbers of container ports: any range that is valid in an SSH configuration. After 40,000 jobs the
# numbers start again, and the oldest jobs can no longer be attached to.
_FIRST, _LAST = 20_000, 59_999
_LOG = "dstack_core.local.ssh"
# How often a connection without channels checks whether it or the server was closed.
_ACCEPT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job runs: its directory and its environment."""

    directory: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Door:
    """A job as its container's SSH server sees it: the key that may log in, the log, and where it runs.

    `place` returns None once the job has ended.
    """

    public_key: str
    read_log: Callable[[datetime | None], Iterator[bytes]]
    place: Callable[[], Place | None] = lambda: None


class SshHost:
    """The SSH server of the host, on a free port of loopback until closed."""

    def __init__(self) -> None:
        self._numbers = itertools.cycle(range(_FIRST, _LAST + 1))
        self._doors: dict[int, Door] = {}
        self._keys: set[str] = set()
        self._lock = threading.Lock()
        self._transports: set[paramiko.Transport] = set()
        self._host_key: paramiko.PKey | None = None
        self._closed = False
        self._listener = socket.create_server((ADDRESS, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="dstack-local-ssh", daemon=True).start()

    def add(self, door: Door) -> int:
        """Return the container port of a new job."""
        number = next(self._numbers)
        self._doors[number] = door
        self._keys.add(key_blob(door.public_key))
        return number

    def door(self, number: int) -> Door | None:
        """Return the job with a container port."""
        return self._doors.get(number)

    def opens_any(self, key: str) -> bool:
        """Return whether a run was submitted with a key (base64); such a key may log in on the host."""
        return key in self._keys

    def close(self) -> None:
        """Stop listening and close every connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            transports = list(self._transports)
        for transport in transports:
            transport.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(connection, None), daemon=True).start()

    def serve(self, way: Any, door: Door | None) -> None:
        """Serve a connection to the host, or to the container behind a door."""
        import paramiko

        from dstack_core.local.ssh_session import Session

        logging.getLogger(_LOG).setLevel(logging.CRITICAL)
        with self._lock:
            self._host_key = self._host_key or paramiko.ECDSAKey.generate()
        session = Session(self, door)
        transport = paramiko.Transport(way)
        transport.set_log_channel(_LOG)
        transport.add_server_key(self._host_key)
        with self._lock:
            self._transports.add(transport)
        try:
            transport.start_server(server=session)
            while transport.is_active() and not self._closed:
                channel = transport.accept(_ACCEPT_SECONDS)
                if channel is not None:
                    session.opened(channel)
        except (paramiko.SSHException, EOFError, OSError):
            pass
        finally:
            transport.close()
            with self._lock:
                self._transports.discard(transport)


def key_blob(line: str) -> str:
    """Return the base64 part of a public key line, which identifies the key."""
    parts = line.split()
    return parts[1] if len(parts) > 1 else line
