"""The fleet of pretended hosts, and how a server is told about it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paramiko

from tests.rig.http_loop import HttpLoop
from tests.rig.pretend_host import PretendHost

USER = "ubuntu"
_KEY_BITS = 2048


class Fleet:
    """Hosts with one common key; each has an address of its own, because a server tells hosts apart by it."""

    def __init__(self, name: str, *, hosts: int, blocks: int, gpus: int, folder: Path, version: str) -> None:
        self.name = name
        key = paramiko.RSAKey.generate(_KEY_BITS)
        text = io.StringIO()
        key.write_private_key(text)
        self._private_key = text.getvalue()
        self._public_key = f"{key.get_name()} {key.get_base64()}"
        self._http = HttpLoop()
        self._hosts: list[PretendHost] = []
        for number in range(1, hosts + 1):
            host = PretendHost(
                address=f"127.0.0.{number}",
                fleet_key=self._public_key,
                http=self._http,
                folder=folder / f"host{number}",
                version=version,
                blocks=blocks,
                gpus=gpus,
            )
            self._hosts.append(host)

    def spec(self) -> dict[str, Any]:
        """Return the configuration that makes a server adopt the hosts (PROTOCOL 5.2)."""
        hosts = [{"hostname": host.address, "port": host.port, "blocks": host.blocks} for host in self._hosts]
        key = {"public": self._public_key, "private": self._private_key}
        configuration: dict[str, Any] = {
            "type": "fleet",
            "name": self.name,
            "ssh_config": {"user": USER, "ssh_key": key, "hosts": hosts},
        }
        if len(hosts) > 1:
            # Without it the server never spreads one run over several hosts.
            configuration["placement"] = "cluster"
        return {"configuration": configuration, "profile": {"name": "default"}}

    def close(self) -> None:
        """Kill all jobs and end the hosts."""
        for host in self._hosts:
            host.close()
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
