"""The SSH daemon of a machine: keys, commands, uploads that are discarded, and port forwarding."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping

import paramiko
from paramiko.common import (
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_SUCCEEDED,
)

from tests.rig.channels import join_in_background
from tests.rig.ssh_listener import SshListener, SshSession

_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
# Seconds. Another thread sends the reply to the request itself after this code has returned; a client that gets
# output or the end of the channel before that reply may miss them.
_ANSWER_DELAY = 0.05


def _no_output(command: str) -> bytes:
    return b""


class SshHost(SshListener):
    """An SSH daemon that accepts the keys of the server and of clients, identified by their `key_blob`.

    `execute` returns the output of a command (the exit status is 0). `routes` maps ports that clients use to ports of
    this machine; other ports are not mapped. With `jump_from`, forwarded connections start from that address and may
    reach any address of loopback, as on a jump host.
    """

    def __init__(
        self,
        host_key: paramiko.PKey,
        *,
        address: str = "127.0.0.1",
        only_from: str | None = None,
        execute: Callable[[str], bytes] = _no_output,
        routes: Mapping[int, int] | None = None,
        jump_from: str | None = None,
    ) -> None:
        self.server_keys: set[str] = set()
        self.client_keys: set[str] = set()
        self.routes: Mapping[int, int] = routes if routes is not None else {}
        self.execute = execute
        self._jump_from = jump_from
        super().__init__(host_key, lambda _: _HostSession(self), address=address, only_from=only_from)

    def connect(self, name: str, port: int) -> socket.socket | None:
        """Connect to a port as seen from this host; return None if it must not be reached."""
        if self._jump_from is not None and name.startswith("127."):
            return socket.create_connection((name, port), source_address=(self._jump_from, 0))
        if name not in _LOOPBACK_NAMES:
            return None
        return socket.create_connection(("127.0.0.1", self.routes.get(port, port)))


class _HostSession(SshSession):
    def __init__(self, host: SshHost) -> None:
        super().__init__(host)
        self._host = host
        self._targets: dict[int, socket.socket] = {}

    def knows(self, username: str, key: paramiko.PKey) -> bool:
        blob = key.get_base64()
        self.from_client = blob in self._host.client_keys
        return self.from_client or blob in self._host.server_keys

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Timer(_ANSWER_DELAY, self._answer, (channel, command.decode())).start()
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        try:
            target = self._host.connect(*destination)
        except OSError:
            return OPEN_FAILED_CONNECT_FAILED
        if target is None:
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._targets[chanid] = target
        return OPEN_SUCCEEDED

    def opened(self, channel: paramiko.Channel) -> None:
        target = self._targets.pop(channel.get_id(), None)
        if target is not None:
            join_in_background(channel, target)

    def _answer(self, channel: paramiko.Channel, command: str) -> None:
        with contextlib.suppress(OSError, paramiko.SSHException):
            channel.sendall(self._host.execute(command))
            channel.send_exit_status(0)
            channel.close()
