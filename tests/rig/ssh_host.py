"""An SSH daemon on loopback: keys, commands, uploads that go nowhere, and port forwarding."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_SUCCEEDED,
)

from tests.rig.sftp import DiscardingSftp

_LOG = "tests.rig.ssh"
logging.getLogger(_LOG).setLevel(logging.CRITICAL)
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
_COPY_BYTES = 65536
_ACCEPT_SECONDS = 1.0
# The reply to the request itself is sent by another thread after this code returned; a client that sees
# output or the end of the channel before that reply may miss them.
_ANSWER_DELAY = 0.05


def key_blob(line: str) -> str:
    """Return the base64 part of a public key line, which identifies the key."""
    return line.split()[1]


def _no_output(command: str) -> bytes:
    return b""


class SshHost:
    """Accept the authorized keys on a free port until closed.

    `execute` answers a command with its output (the exit status is 0); `routes` says which port of this
    machine stands for a port that clients know, any other port is itself.
    """

    def __init__(
        self,
        host_key: paramiko.PKey,
        *,
        address: str = "127.0.0.1",
        execute: Callable[[str], bytes] = _no_output,
        routes: Mapping[int, int] | None = None,
    ) -> None:
        self.authorized: set[str] = set()
        self.routes: dict[int, int] = dict(routes or {})
        self.execute = execute
        self._host_key = host_key
        self._closed = False
        self._transports: list[paramiko.Transport] = []
        self._listening = socket.create_server((address, 0), backlog=128)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for transport in self._transports:
            transport.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        transport.set_log_channel(_LOG)
        transport.add_server_key(self._host_key)
        transport.set_subsystem_handler("sftp", paramiko.SFTPServer, DiscardingSftp)
        self._transports.append(transport)
        session = _Session(self)
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
            self._transports.remove(transport)


class _Session(paramiko.ServerInterface):
    """What one connection may do."""

    def __init__(self, host: SshHost) -> None:
        self._host = host
        self._targets: dict[int, socket.socket] = {}

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL if key.get_base64() in self._host.authorized else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED if kind == "session" else OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Timer(_ANSWER_DELAY, self._answer, (channel, command.decode())).start()
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        name, port = destination
        if name not in _LOOPBACK_NAMES:
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        try:
            target = socket.create_connection(("127.0.0.1", self._host.routes.get(port, port)))
        except OSError:
            return OPEN_FAILED_CONNECT_FAILED
        self._targets[chanid] = target
        return OPEN_SUCCEEDED

    def opened(self, channel: paramiko.Channel) -> None:
        """Join a forwarded channel with its port."""
        target = self._targets.pop(channel.get_id(), None)
        if target is not None:
            threading.Thread(target=_join, args=(channel, target), daemon=True).start()

    def _answer(self, channel: paramiko.Channel, command: str) -> None:
        with contextlib.suppress(OSError, paramiko.SSHException):
            channel.sendall(self._host.execute(command))
            channel.send_exit_status(0)
            channel.close()


def _join(channel: paramiko.Channel, target: socket.socket) -> None:
    """Copy both ways until both sides have said everything."""
    backwards = threading.Thread(target=_copy_to_channel, args=(target, channel), daemon=True)
    backwards.start()
    with contextlib.suppress(OSError):
        while data := channel.recv(_COPY_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    backwards.join()
    channel.close()
    target.close()


def _copy_to_channel(target: socket.socket, channel: paramiko.Channel) -> None:
    # The other side may be gone already: paramiko says so with an EOFError.
    with contextlib.suppress(OSError, EOFError):
        while data := target.recv(_COPY_BYTES):
            channel.sendall(data)
        channel.shutdown_write()
