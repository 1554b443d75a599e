"""The fleet of simulated hosts, and the configuration by which a server adopts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paramiko

from tests.rig.http_loop import HttpLoop
from tests.rig.pretend_host import PretendHost
from tests.rig.shim import Container
from tests.rig.ssh_host import SshHost
from tests.rig.ssh_keys import KeyPair, new_key_pair
from tests.rig.ssh_listener import SshListener, key_blob

USER = "ubuntu"
JUMP_USER = "jumper"
_JUMP_FROM = "127.0.1.1"


class Fleet:
    """Hosts with one common key; each has an address of its own, by which a server distinguishes hosts.

    `network` are the first three numbers of those addresses. With `jump_host` they accept connections from that host
    only. `jump_key` is a key of a user that may log in there; a run's own key may not.
    """

    def __init__(
        self,
        name: str,
        *,
        network: str,
        hosts: int,
        blocks: int,
        gpus: int,
        jump_host: bool,
        folder: Path,
        version: str,
        container: Container,
    ) -> None:
        self.name = name
        self._key = new_key_pair()
        self._http = HttpLoop()
        self._jump: SshHost | None = None
        self.jump_key: KeyPair | None = None
        if jump_host:
            self.jump_key = new_key_pair()
            self._jump = SshHost(paramiko.ECDSAKey.generate(), jump_from=_JUMP_FROM)
            self._jump.server_keys.add(key_blob(self._key.public))
            self._jump.client_keys.add(key_blob(self.jump_key.public))
        self._hosts = [
            PretendHost(
                address=f"{network}.{number}",
                fleet_key=self._key.public,
                http=self._http,
                folder=folder / f"host{number}",
                version=version,
                blocks=blocks,
                gpus=gpus,
                container=container,
                only_from=_JUMP_FROM if jump_host else None,
            )
            for number in range(1, hosts + 1)
        ]

    def spec(self) -> dict[str, Any]:
        """Return the configuration that makes a server adopt the hosts (PROTOCOL 5.2)."""
        hosts = [{"hostname": host.address, "port": host.port, "blocks": host.blocks} for host in self._hosts]
        key = {"public": self._key.public, "private": self._key.private}
        ssh_config: dict[str, Any] = {"user": USER, "ssh_key": key, "hosts": hosts}
        if self._jump is not None:
            jump = {"hostname": "127.0.0.1", "port": self._jump.port, "user": JUMP_USER}
            ssh_config["proxy_jump"] = {**jump, "identity_file": "given-as-ssh_key", "ssh_key": key}
        configuration: dict[str, Any] = {"type": "fleet", "name": self.name, "ssh_config": ssh_config}
        if len(hosts) > 1:
            # Without this, the server never spreads one run over several hosts.
            configuration["placement"] = "cluster"
        return {"configuration": configuration, "profile": {"name": "default"}}

    def listeners(self) -> list[SshListener]:
        """List the SSH daemons of the jump host, the hosts and the containers."""
        jump: list[SshListener] = [self._jump] if self._jump is not None else []
        return jump + [listener for host in self._hosts for listener in host.listeners()]

    def close(self) -> None:
        """Kill all jobs and end the hosts."""
        for host in self._hosts:
            host.close()
        if self._jump is not None:
            self._jump.close()
        self._http.stop()


def waiting_for(reply: dict[str, Any]) -> list[str]:
    """Return the instances of a fleet that are not idle yet; one that ended raises `RuntimeError`."""
    instances: Sequence[dict[str, Any]] = reply["instances"]
    for instance in instances:
        if instance["status"] in ("terminating", "terminated"):
            raise RuntimeError(f"{instance['name']}: {instance.get('termination_reason')}")
    return [
        f"{instance['name']} is {instance['status']}"
        for instance in instances
        if instance["status"] != "idle"
    ]
