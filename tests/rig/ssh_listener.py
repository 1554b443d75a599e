"""An SSH port on loopback, whose connections can be listed, cut and refused."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from abc import abstractmethod
from collections.abc import Callable

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_SUCCEEDED,
)

from tests.rig.sftp import DiscardingSftp

_LOG = "tests.rig.ssh"
logging.getLogger(_LOG).setLevel(logging.CRITICAL)
# How often a connection without new channels checks whether it was closed.
_ACCEPT_SECONDS = 1.0


def key_blob(line: str) -> str:
    """Return the base64 part of a public key line, which identifies the key."""
    return line.split()[1]


class SshSession(paramiko.ServerInterface):
    """The rights of one connection; `from_client` is False for a connection of the dstack server."""

    from_client = False

    def __init__(self, listener: SshListener) -> None:
        self._listener = listener

    @abstractmethod
    def knows(self, username: str, key: paramiko.PKey) -> bool:
        """Return whether a key may log in, and set `from_client`."""

    @abstractmethod
    def opened(self, channel: paramiko.Channel) -> None:
        """Serve a channel that was accepted."""

    def closed(self) -> None:
        """Release the resources of the connection."""

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = self.knows(username, key)
        if self.from_client and self._listener.refusing:
            # Do not refuse the key, but lose the connection, as on a network that fails.
            raise EOFError
        return AUTH_SUCCESSFUL if known else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED if kind == "session" else OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED


class SshListener:
    """An SSH port that accepts connections until closed; `only_from` is the only address they may come from."""

    def __init__(
        self,
        host_key: paramiko.PKey,
        open_session: Callable[[SshListener], SshSession],
        *,
        address: str = "127.0.0.1",
        only_from: str | None = None,
    ) -> None:
        self.refusing = False
        self._host_key = host_key
        self._open_session = open_session
        self._only_from = only_from
        self._closed = False
        self._lock = threading.Lock()
        self._connections: dict[paramiko.Transport, SshSession] = {}
        self._listening = socket.create_server((address, 0), backlog=128)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening and close every connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            connections = list(self._connections)
        for transport in connections:
            transport.close()

    def client_connections(self) -> list[paramiko.Transport]:
        """List the connections of clients that are logged in, not those of the dstack server."""
        with self._lock:
            connections = dict(self._connections)
        return [
            transport
            for transport, session in connections.items()
            if session.from_client and transport.is_authenticated()
        ]

    def cut_clients(self) -> int:
        """Cut the connections of clients and return how many; the port keeps listening."""
        connections = self.client_connections()
        for transport in connections:
            transport.close()
        return len(connections)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, (source, _) = self._listening.accept()
            except OSError:
                return
            if self._only_from not in (None, source):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = paramiko.Transport(connection)
        transport.set_log_channel(_LOG)
        transport.add_server_key(self._host_key)
        transport.set_subsystem_handler("sftp", paramiko.SFTPServer, DiscardingSftp)
        session = self._open_session(self)
        with self._lock:
            self._connections[transport] = session
        try:
            transport.start_server(server=session)
            while transport.is_active():
                channel = transport.accept(_ACCEPT_SECONDS)
                if channel is not None:
                    session.opened(channel)
        except (paramiko.SSHException, EOFError, OSError):
            pass
        finally:
            transport.close()
            with self._lock:
                del self._connections[transport]
            session.closed()
