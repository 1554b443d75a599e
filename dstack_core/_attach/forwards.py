"""Carry connections to local ports through a tunnel to ports of the container."""

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
_PIECE = 65536
_PATIENCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.5


class OpensChannels(Protocol):
    """Be the way to the container."""

    def channel(self, port: int, patience: float) -> paramiko.Channel:
        """Return a channel to a port; wait up to ``patience`` seconds. Raises ``AttachError``."""


class Forward:
    """Accept on a listening socket and join every connection with a port of the container.

    While the way is cut a new connection waits up to 10 seconds and is closed then; those that stand are
    closed at once.
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
        with contextlib.suppress(OSError):
            # Closing alone would not wake the thread that accepts.
            self._listening.shutdown(socket.SHUT_RDWR)
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

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if self._closing.wait(_PAUSE_SECONDS):
                    return
                # Such as too many open files, which passes.
                _log.warning("Local port %d: %s", self.local_port, error)
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                if self._closing.is_set():
                    connection.close()
                    return
                self._open.add(connection)
                self._threads.add(thread)
            thread.start()

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
    """Copy both ways until both sides have said everything, or one is gone."""
    outward = threading.Thread(target=_copy_out, args=(connection, channel), daemon=True)
    outward.start()
    with contextlib.suppress(OSError):
        while data := channel.recv(_PIECE):
            connection.sendall(data)
        # The other half may still be wanted, unless the channel is gone altogether.
        connection.shutdown(socket.SHUT_RDWR if channel.closed else socket.SHUT_WR)
    outward.join()


def _copy_out(connection: socket.socket, channel: paramiko.Channel) -> None:
    # paramiko tells with an EOFError that the connection it writes to is gone.
    with contextlib.suppress(OSError, EOFError):
        while data := connection.recv(_PIECE):
            channel.sendall(data)
        channel.shutdown_write()


def _close(channel: paramiko.Channel) -> None:
    with contextlib.suppress(OSError, EOFError):
        channel.close()
