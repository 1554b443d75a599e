"""A real dstack server with a fleet of simulated hosts."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import paramiko
import requests

from tests.rig import processes
from tests.rig.clients import ClientConnections
from tests.rig.fleet import JUMP_USER, Fleet, waiting_for
from tests.rig.server_process import DEFAULT_VERSION, RigError, ServerAddress, ServerProcess
from tests.rig.shim import Container
from tests.rig.ssh_listener import SshListener
from tests.rig.sshproxy import SshProxy

__all__ = ["DEFAULT_VERSION", "RealServer", "RigError"]

_FIRST_FLEETS_APPLY = (0, 19, 6)
# Deadlines in seconds for a busy machine with two cores; on an idle one it takes a tenth.
_IDLE_SECONDS = 180.0
_END_SECONDS = 30.0
_POLL_SECONDS = 0.1
_REQUEST_SECONDS = 30.0
_FIRST_PROJECT = "main"


class RealServer:
    """A server and its fleet, started on entry; the exit ends every process and deletes every file.

    A client needs `url`, `token`, `project` and `fleet`. Errors raise `RigError` with the end of the server's log.

    * `fast` shortens the pauses of the server's background steps.
    * `hosts` is the number of simulated machines, `blocks` how many jobs each can hold, `gpus` how many GPUs
      each claims to have. Nodes of one run get a host each: servers before 0.20 only with `blocks=1`.
    * `jump_host` puts the hosts behind another one, where a client logs in with `jump_user` and `jump_key_path`.
    * `sshproxy` (servers since 0.20.14) adds a simulated dstack-sshproxy.
    * `images` makes every image look plain to the server: no entrypoint, user root, x86.
    * `impatient` makes the server fail a job soon that it cannot start or reach.
    * `routes` maps ports in the containers to ports of this machine; `path` names folders in which jobs search for
      commands first. Both may be changed later, in `container`.
    * `at` is a running server: then only the fleet is created, in a `project` of its own.

    `clients` counts, cuts and refuses the SSH connections of clients.
    """

    def __init__(
        self,
        version: str = DEFAULT_VERSION,
        python: Path | None = None,
        *,
        fast: bool = True,
        hosts: int = 1,
        blocks: int = 16,
        gpus: int = 0,
        jump_host: bool = False,
        sshproxy: bool = False,
        images: bool = False,
        impatient: bool = False,
        routes: dict[int, int] | None = None,
        path: list[Path] | None = None,
        at: ServerAddress | None = None,
        project: str = _FIRST_PROJECT,
    ) -> None:
        self.version = at.version if at is not None else version
        self.project = project
        self.fleet = "rig"
        self.boot_seconds = 0.0
        self.idle_seconds = 0.0
        self.container = Container(dict(routes or {}), list(path or []))
        self.clients = ClientConnections(self._listeners)
        self._python = python
        self._launch = {"fast": fast, "images": images, "impatient": impatient}
        self._size: dict[str, Any] = {"hosts": hosts, "blocks": blocks, "gpus": gpus, "jump_host": jump_host}
        self._with_sshproxy = sshproxy
        self._at = at
        self._address: ServerAddress | None = None
        self._folder: Path | None = None
        self._cleaner: subprocess.Popen[bytes] | None = None
        self._process: ServerProcess | None = None
        self._sshproxy: SshProxy | None = None
        self._hosts: Fleet | None = None
        self._session = requests.Session()
        self._session.trust_env = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def release(self) -> tuple[int, ...]:
        """Return the version as numbers."""
        return tuple(int(part) for part in self.version.split("."))

    @property
    def address(self) -> ServerAddress:
        """Return the address of the server, for `at`."""
        return self._started

    @property
    def url(self) -> str:
        """Return the address of the API."""
        return self._started.url

    @property
    def token(self) -> str:
        """Return the token of the administrator."""
        return self._started.token

    @property
    def log_path(self) -> Path:
        """Return the path of the server's log, which exists until the exit."""
        return Path(self._started.log_path)

    def log_tail(self) -> str:
        """Return the last lines of the log, for the message of a failed test."""
        return self._address.log_tail() if self._address is not None else ""

    @property
    def jump_user(self) -> str:
        """Return the name with which a client logs in to the jump host."""
        return JUMP_USER

    @property
    def jump_key_path(self) -> Path:
        """Return the private key with which a client logs in to the jump host."""
        if self._folder is None:
            raise RigError("the server is not started")
        return self._folder / "jump_key"

    def start(self) -> None:
        """Start the server, create the fleet and wait until every host is idle."""
        # A short path, because the server keeps UNIX sockets below it.
        self._folder = Path(tempfile.mkdtemp(prefix="rig-"))
        self._cleaner = processes.start_cleaner(self._folder)
        try:
            began = time.monotonic()
            self._address = self._at or self._launch_server(self._folder)
            self.boot_seconds = time.monotonic() - began
            if self.project != _FIRST_PROJECT:
                self._post("projects/create", {"project_name": self.project}, of_project=False)
            self._make_fleet(self._folder)
            self.idle_seconds = time.monotonic() - began - self.boot_seconds
        except BaseException:
            self.stop()
            raise

    def wait_until_idle(self) -> None:
        """Wait until no host has a job; a run of several nodes finds no capacity on a host that has one."""
        deadline = time.monotonic() + _IDLE_SECONDS
        while True:
            self._check_alive()
            try:
                missing = waiting_for(self._post("fleets/get", {"name": self.fleet}))
            except RuntimeError as error:
                raise RigError(f"{error}\n{self.log_tail()}") from error
            if not missing:
                return
            if time.monotonic() > deadline:
                raise RigError(f"{', '.join(missing)}\n{self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def restart(self, meanwhile: Callable[[], object] = lambda: None, *, kill: bool = False) -> None:
        """End the server, or ``kill`` it, and start it again at the same address with its stored state.

        The hosts and their jobs keep running; ``meanwhile`` is called while the port is closed. Not for a shared
        server.
        """
        if self._process is None:
            raise RigError("restart: expected a server that this process started, got a shared one")
        self._process.stop(kill=kill)
        meanwhile()
        self._process.start()

    def stop(self) -> None:
        """End the server, the jobs and the hosts, and delete the files."""
        self._session.close()
        try:
            if self._process is not None:
                self._process.stop()
            if self._sshproxy is not None:
                self._sshproxy.close()
            if self._hosts is not None:
                self._hosts.close()
        finally:
            if self._cleaner is not None:
                # The server's SSH connections leave its process group on purpose; the cleaner finds and kills them.
                self._cleaner.communicate(timeout=_END_SECONDS)
            self._process = self._sshproxy = self._hosts = self._cleaner = self._folder = None

    @property
    def _started(self) -> ServerAddress:
        if self._address is None:
            raise RigError("the server is not started")
        return self._address

    def _launch_server(self, folder: Path) -> ServerAddress:
        variables = {}
        if self._with_sshproxy:
            token = secrets.token_hex(16)
            self._sshproxy = SshProxy(paramiko.ECDSAKey.generate(), token, lambda: self.url)
            variables = {
                "DSTACK_SSHPROXY_API_TOKEN": token,
                "DSTACK_SERVER_SSHPROXY_ADDRESS": f"127.0.0.1:{self._sshproxy.port}",
            }
        self._process = ServerProcess(self.version, folder, self._python, **self._launch, variables=variables)
        self._process.start()
        return self._process.address

    def _listeners(self) -> list[SshListener]:
        found = self._hosts.listeners() if self._hosts is not None else []
        return [*found, self._sshproxy] if self._sshproxy is not None else found

    def _make_fleet(self, folder: Path) -> None:
        self._hosts = Fleet(
            self.fleet,
            network=self._network(),
            **self._size,
            folder=folder / "jobs",
            version=self.version,
            container=self.container,
        )
        if self._hosts.jump_key is not None:
            self.jump_key_path.touch(mode=0o600)
            self.jump_key_path.write_text(self._hosts.jump_key.private)
        spec = self._hosts.spec()
        if self.release >= _FIRST_FLEETS_APPLY:
            self._post("fleets/apply", {"plan": {"spec": spec}, "force": False})
        else:
            self._post("fleets/create", {"spec": spec})
        self.wait_until_idle()

    def _network(self) -> str:
        """Return addresses that no other fleet of the same server has."""
        if self._at is None:
            return "127.0.0"
        return f"127.{secrets.randbelow(200) + 16}.{secrets.randbelow(254) + 1}"

    def _post(self, path: str, body: dict[str, Any], *, of_project: bool = True) -> Any:
        prefix = f"project/{self.project}/" if of_project else ""
        reply = self._session.post(
            f"{self.url}/api/{prefix}{path}",
            json=body,
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=_REQUEST_SECONDS,
        )
        if not reply.ok:
            raise RigError(f"{path}: {reply.status_code} {reply.text}\n{self.log_tail()}")
        return reply.json()

    def _check_alive(self) -> None:
        if self._process is not None:
            self._process.check_alive()
