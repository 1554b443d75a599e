"""The rights of a client on one SSH connection: log in with the key of a job, use its ports and a shell."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_SUCCEEDED,
)

from dstack_core.local.live_log import LiveLog
from dstack_core.local.ssh_host import ADDRESS, RUNNER_PORT, Door, SshHost, key_blob
from dstack_core.local.ssh_shell import Shell

_LOOPBACK = {"localhost", ADDRESS, "::1"}
# Bytes to copy at once: two of the 32 KB packets that paramiko sends by default.
_COPY = 65536
Pipe = paramiko.Channel | socket.socket


class InnerWay:
    """The channel in which a second connection runs; it can be closed after the first connection was cut."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def close(self) -> None:
        """Close the channel."""
        with contextlib.suppress(OSError, EOFError):
            self._channel.close()


class Session(paramiko.ServerInterface):
    """A connection to the host (`door` is None), or to the container of a job."""

    def __init__(self, host: SshHost, door: Door | None) -> None:
        self._host = host
        self._door = door
        self._targets: dict[int, socket.socket | Door | None] = {}
        self._shells: dict[int, Shell] = {}

    def get_allowed_auths(self, username: str) -> str:
        """Allow only keys."""
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        """Accept the keys that runs were submitted with."""
        text = key.get_base64()
        known = self._host.opens_any(text) if self._door is None else key_blob(self._door.public_key) == text
        return AUTH_SUCCESSFUL if known else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        """Allow sessions: for a shell, and empty ones, since a client may need one to stay connected."""
        return OPEN_SUCCEEDED if kind == "session" else OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_pty_request(
        self,
        channel: paramiko.Channel,
        term: bytes,
        width: int,
        height: int,
        pixelwidth: int,
        pixelheight: int,
        modes: bytes,
    ) -> bool:
        """Give the shell of the channel a terminal."""
        shell = self._shell(channel)
        if shell is not None:
            shell.use_terminal(term.decode(errors="replace"), width, height)
        return shell is not None

    def check_channel_window_change_request(
        self, channel: paramiko.Channel, width: int, height: int, pixelwidth: int, pixelheight: int
    ) -> bool:
        """Change the size of the terminal."""
        shell = self._shell(channel)
        if shell is not None:
            shell.resize(width, height)
        return shell is not None

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        """Start a shell in the job's directory; the host has none."""
        return self._start(channel, None)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        """Start a command in the job's directory; the host runs none."""
        return self._start(channel, command.decode(errors="surrogateescape"))

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        """Connect to a container (from the host), or to a port of the job (from its container)."""
        name, port = destination
        if name not in _LOOPBACK:
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        if self._door is None:
            container = self._host.door(port)
            if container is None:
                return OPEN_FAILED_CONNECT_FAILED
            self._targets[chanid] = container
        elif port == RUNNER_PORT:
            self._targets[chanid] = None
        else:
            try:
                target = socket.create_connection((ADDRESS, port))
            except OSError:
                return OPEN_FAILED_CONNECT_FAILED
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._targets[chanid] = target
        return OPEN_SUCCEEDED

    def opened(self, channel: paramiko.Channel) -> None:
        """Serve a channel that was opened, in the background."""
        if channel.get_id() not in self._targets:
            return
        target = self._targets.pop(channel.get_id())
        if isinstance(target, socket.socket):
            _in_background(_join, channel, target)
        elif isinstance(target, Door):
            _in_background(self._host.serve, InnerWay(channel), target)
        elif self._door is not None:
            _in_background(LiveLog(channel, self._door.read_log).serve)

    def _shell(self, channel: paramiko.Channel) -> Shell | None:
        known = self._shells.get(channel.get_id())
        place = None if self._door is None or known else self._door.place()
        if place is not None:
            known = self._shells[channel.get_id()] = Shell(channel, place)
        return known

    def _start(self, channel: paramiko.Channel, command: str | None) -> bool:
        shell = self._shell(channel)
        if shell is not None:
            shell.start(command)
        return shell is not None


def _in_background(work: object, *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def _join(channel: paramiko.Channel, target: socket.socket) -> None:
    """Copy in both directions until both sides have sent everything, then close both."""
    backwards = threading.Thread(target=_copy, args=(target, channel), daemon=True)
    backwards.start()
    _copy(channel, target)
    backwards.join()
    for pipe in (channel, target):
        with contextlib.suppress(OSError, EOFError):
            pipe.close()


def _copy(source: Pipe, target: Pipe) -> None:
    with contextlib.suppress(OSError, EOFError):
        while data := source.recv(_COPY):
            target.sendall(data)
    with contextlib.suppress(OSError, EOFError):
        target.shutdown(socket.SHUT_WR)
