"""A simulated dstack-sshproxy: one address through which users reach every container (PROTOCOL 4.4)."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import paramiko
import requests
from paramiko.common import OPEN_FAILED_CONNECT_FAILED, OPEN_SUCCEEDED

from tests.rig.channels import Pipe, join_in_background
from tests.rig.ssh_keys import private_key
from tests.rig.ssh_listener import SshListener, SshSession, key_blob

# An upper bound for a busy machine.
_REQUEST_SECONDS = 30.0
_ROOT_SUFFIX = "_root"
_NO_ADDRESS = ("127.0.0.1", 0)

Upstream = dict[str, Any]


class SshProxy(SshListener):
    """An SSH proxy that gets from the server who may log in as `{upstream id}` or `{upstream id}_root`, and to where.

    `find_url` returns the address of the server, which is unknown before its start.
    """

    def __init__(self, host_key: paramiko.PKey, token: str, find_url: Callable[[], str]) -> None:
        self._token = token
        self._find_url = find_url
        self._requests = requests.Session()
        self._requests.trust_env = False
        super().__init__(host_key, lambda _: _ProxySession(self))

    def upstream(self, upstream_id: str) -> Upstream | None:
        """Return the hops and the authorized keys of a running job, None if the server does not know it."""
        reply = self._requests.post(
            f"{self._find_url()}/api/sshproxy/get_upstream",
            json={"id": upstream_id},
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=_REQUEST_SECONDS,
        )
        found: Upstream | None = reply.json() if reply.ok else None
        return found


class _ProxySession(SshSession):
    def __init__(self, proxy: SshProxy) -> None:
        super().__init__(proxy)
        self._proxy = proxy
        self._upstreams: dict[str, Upstream | None] = {}
        self._username = ""
        self._hops: list[paramiko.Transport] = []
        self._targets: dict[int, paramiko.Channel] = {}

    def knows(self, username: str, key: paramiko.PKey) -> bool:
        if username not in self._upstreams:
            self._upstreams[username] = self._proxy.upstream(username.removesuffix(_ROOT_SUFFIX))
        upstream = self._upstreams[username]
        allowed = {key_blob(line) for line in upstream["authorized_keys"]} if upstream else set()
        self._username = username
        self.from_client = key.get_base64() in allowed
        return self.from_client

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        try:
            target = self._container().open_session()
            target.exec_command(command.decode())
        except (OSError, EOFError, paramiko.SSHException):
            return False
        threading.Thread(target=_answer, args=(channel, target), daemon=True).start()
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        try:
            self._targets[chanid] = self._container().open_channel("direct-tcpip", destination, origin)
        except (OSError, EOFError, paramiko.SSHException):
            return OPEN_FAILED_CONNECT_FAILED
        return OPEN_SUCCEEDED

    def opened(self, channel: paramiko.Channel) -> None:
        target = self._targets.pop(channel.get_id(), None)
        if target is not None:
            join_in_background(channel, target)

    def closed(self) -> None:
        for hop in reversed(self._hops):
            hop.close()

    def _container(self) -> paramiko.Transport:
        """Return the connection to the container, through every hop before it."""
        upstream = self._upstreams[self._username]
        if not self._hops and upstream is not None:
            for hop in upstream["hosts"]:
                address = (hop["host"], hop["port"])
                way: Pipe = (
                    self._hops[-1].open_channel("direct-tcpip", address, _NO_ADDRESS)
                    if self._hops
                    else socket.create_connection(address)
                )
                transport = paramiko.Transport(way)
                self._hops.append(transport)
                transport.connect(username=hop["user"], pkey=private_key(hop["private_key"]))
        return self._hops[-1]


def _answer(channel: paramiko.Channel, target: paramiko.Channel) -> None:
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        with target.makefile("rb") as output:
            channel.sendall(output.read())
        channel.send_exit_status(target.recv_exit_status())
        channel.close()
