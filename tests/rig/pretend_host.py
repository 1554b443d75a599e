"""A simulated host of an SSH fleet, as the server finds it when it logs in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import paramiko

from tests.rig.http_loop import HttpLoop
from tests.rig.shim import Container, Shim
from tests.rig.ssh_host import SshHost
from tests.rig.ssh_listener import SshListener, key_blob

SHIM_PORT = 10998
_GIB = 1024**3
_PUBLIC_KEY = re.compile(r"(?:ssh-|ecdsa-)\S+ [A-Za-z0-9+/=]{40,}")
# More than the default resources of a job: 2 CPUs, 8 GB of memory, 100 GB of disk (PROTOCOL 1.5).
_CPUS_PER_BLOCK = 4
_MEMORY_PER_BLOCK = 32 * _GIB
_DISK_PER_BLOCK = 200 * _GIB
_GPU_MEMORY_MIB = 81920


class PretendHost:
    """A host that accepts the server's deployment and runs its jobs on this machine.

    It claims to be large enough for the default resources of a job in every block, whatever this machine has.
    """

    def __init__(
        self,
        *,
        address: str,
        fleet_key: str,
        http: HttpLoop,
        folder: Path,
        version: str,
        blocks: int,
        gpus: int,
        container: Container,
        only_from: str | None,
    ) -> None:
        self.address = address
        self.blocks = blocks
        self._gpus = gpus
        host_key = paramiko.ECDSAKey.generate()
        routes: dict[int, int] = {}
        self._ssh = SshHost(
            host_key, address=address, only_from=only_from, execute=self._execute, routes=routes
        )
        self._ssh.server_keys.add(key_blob(fleet_key))
        self._shim = Shim(self._ssh, host_key, http, folder, version, container)
        routes[SHIM_PORT] = http.serve(self._shim.app).port

    @property
    def port(self) -> int:
        """Return the port of the SSH daemon."""
        return self._ssh.port

    def listeners(self) -> list[SshListener]:
        """List the SSH daemons of the host and of its containers."""
        return [self._ssh, *self._shim.listeners()]

    def close(self) -> None:
        """Kill the jobs and cut the connections."""
        self._shim.close()
        self._ssh.close()

    def _execute(self, command: str) -> bytes:
        if command == "uname -m":
            return b"x86_64\n"
        if "authorized_keys" in command:
            self._ssh.server_keys.update(key_blob(line) for line in _PUBLIC_KEY.findall(command))
            return b""
        if command.startswith("sudo cat ") and "host_info" in command:
            return json.dumps(self._info()).encode()
        if command.startswith("curl ") and "/api/healthcheck" in command:
            return json.dumps(self._shim.healthcheck()).encode()
        return b""  # a command that would install the agents

    def _info(self) -> dict[str, object]:
        return {
            "gpu_vendor": "nvidia" if self._gpus else "none",
            "gpu_name": "A100" if self._gpus else "",
            "gpu_memory": _GPU_MEMORY_MIB if self._gpus else 0,
            "gpu_count": self._gpus,
            "addresses": [f"{self.address}/8"],
            "disk_size": _DISK_PER_BLOCK * self.blocks,
            "cpus": _CPUS_PER_BLOCK * self.blocks,
            "memory": _MEMORY_PER_BLOCK * self.blocks,
        }
