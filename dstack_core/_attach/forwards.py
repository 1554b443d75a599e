"""Forwarding of connections to local ports through a tunnel to ports of the container.

One thread accepts, and each connection has two: one copies towards the container, the other one back. A local
connection closes each direction by itself (a client sends its request, ends its side, and still reads), so
each thread passes the end of its direction on and leaves the other one open.

Closing has to wake every thread that blocks in a call: ``shutdown`` wakes ``accept`` and ``recv`` of a
socket, closing a channel wakes its ``recv``. Outside Linux ``shutdown`` is an error for a listening socket,
so there a connection to its port wakes ``accept``. All are recorded under the lock, and a thread that
registers after ``close`` has begun sees ``_closing`` and ends, so none is missed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING, Protocol

from dstack_core.errors import AttachError

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger("dstack_core")
# Most bytes copied at once: two SSH packets of the usual 32 KiB. Less costs more calls of the system; more
# only memory, since an SSH channel rarely has more to give at once.
_PIECE = 65536
# Seconds that a new connection waits for a broken tunnel. Chosen: long enough for a reconnect, and shorter
# than the time limits of common clients. Then it is closed, and the client sees an error instead of nothing.
_PATIENCE_SECONDS = 10.0
# Seconds between two tries to accept after an error such as too many open files; without a pause this thread
# would use a whole core until it passes.
_PAUSE_SECONDS = 0.5
# Most connections of one port at once. Chosen: more than a browser, a notebook or a load test opens. Where
# the run is on this machine, a forward may be what listens on the run's port. Then each connection would open
# the next one, until the machine has no thread left.
_MOST_CONNECTIONS = 256
# What Python raises where the machine has no memory or no thread left. It costs that connection alone: the
# forward continues, since the next connection may find room again.
_NO_ROOM = (RuntimeError, MemoryError)


class OpensChannels(Protocol):
    """A connection to the container that opens channels."""

    def channel(self, port: int, patience: float) -> paramiko.Channel:
        """Return a channel to a port; wait at most ``patience`` seconds. Raises ``AttachError``."""


class Forward:
    """A listening local socket whose connections are joined with a port of the container.

    At most 256 connections are open at once; one more is closed, with a warning.
    While the tunnel is broken, a new connection waits up to 10 seconds and is then closed; connections that
    were open when it broke are closed at once.
    """

    def __init__(self, listening: socket.socket, container_port: int, way: OpensChannels) -> None:
        self.local_port: int = listening.getsockname()[1]
        self._container_port = container_port
        self._listening = listening
        self._way = way
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._channels: set[paramiko.Channel] = set()
        self._threads: set[threading.Thread] = set()
        self._acceptor = threading.Thread(target=self._accept, name="dstack-forward", daemon=True)

    def start(self) -> None:
        """Accept connections from now on."""
        self._acceptor.start()

    def close(self) -> None:
        """Stop listening, cut every connection and wait for the threads to end."""
        with self._lock:
            self._closing.set()
            connections, channels, threads = list(self._open), list(self._channels), list(self._threads)
        self._wake_acceptor()
        self._listening.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for channel in channels:
            _close(channel)
        if self._acceptor.ident is not None:
            threads.append(self._acceptor)
        for thread in threads:
            thread.join()

    def _wake_acceptor(self) -> None:
        # Closing alone would not wake the thread that accepts.
        try:
            self._listening.shutdown(socket.SHUT_RDWR)
        except OSError:
            with contextlib.suppress(OSError):
                socket.create_connection(self._listening.getsockname()[:2], timeout=1.0).close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except (OSError, MemoryError) as error:
                if self._closing.wait(_PAUSE_SECONDS):
                    return
                # Not closed, so the error is one that passes, such as too many open files.
                _log.warning("Local port %d: %s", self.local_port, error)
                continue
            if not self._take(connection):
                return

    def _take(self, connection: socket.socket) -> bool:
        """Serve a connection in a thread of its own; return false if this forward is closing."""
        with self._lock:
            if self._closing.is_set():
                connection.close()
                return False
            if len(self._open) >= _MOST_CONNECTIONS:
                connection.close()
                _log.warning(
                    "Local port %d: a connection was closed: %d are open. If your clients opened fewer, the "
                    "run is on this machine and its port is this one: forward it to another one, such as "
                    'with "*:%d".',
                    self.local_port,
                    _MOST_CONNECTIONS,
                    self._container_port,
                )
                return True
            try:
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                # Under the lock: `close` joins the recorded threads, and only a started one can be joined.
                thread.start()
            except _NO_ROOM as error:
                connection.close()
                _log.warning("Local port %d: a connection was closed: %s", self.local_port, error)
                return True
            self._open.add(connection)
            self._threads.add(thread)
        return True

    def _serve(self, connection: socket.socket) -> None:
        channel: paramiko.Channel | None = None
        try:
            channel = self._way.channel(self._container_port, _PATIENCE_SECONDS)
            with self._lock:
                self._channels.add(channel)
                closed = self._closing.is_set()
            if not closed:
                _join(connection, channel)
        except AttachError as error:
            _log.debug("A connection to the local port %d was closed: %s", self.local_port, error)
        except _NO_ROOM as error:
            _log.warning("Local port %d: a connection was closed: %s", self.local_port, error)
        finally:
            if channel is not None:
                _close(channel)
            connection.close()
            with self._lock:
                self._open.discard(connection)
                self._threads.discard(threading.current_thread())
                if channel is not None:
                    self._channels.discard(channel)


def _join(connection: socket.socket, channel: paramiko.Channel) -> None:
    """Copy both ways until both sides have ended their direction, or one is gone."""
    outward = threading.Thread(target=_copy_out, args=(connection, channel), daemon=True)
    outward.start()
    with contextlib.suppress(OSError):
        while data := channel.recv(_PIECE):
            connection.sendall(data)
        # The client may still send, unless the channel is closed in both directions.
        connection.shutdown(socket.SHUT_RDWR if channel.closed else socket.SHUT_WR)
    outward.join()


def _copy_out(connection: socket.socket, channel: paramiko.Channel) -> None:
    # paramiko raises EOFError, not OSError, if the connection it writes to is gone.
    try:
        while data := connection.recv(_PIECE):
            channel.sendall(data)
        channel.shutdown_write()
    except (OSError, EOFError):
        pass
    except MemoryError as error:
        # Closed, so that the client sees an end and does not wait for an answer to what was not sent.
        _log.warning("A forwarded connection was closed: %s", error or "no memory")
        _close(channel)


def _close(channel: paramiko.Channel) -> None:
    with contextlib.suppress(OSError, EOFError):
        channel.close()
