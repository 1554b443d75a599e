"""A real dstack server as a child process, with a fleet of pretended hosts."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from tests.rig import processes
from tests.rig.fleet import Fleet, waiting_for

DEFAULT_VERSION = os.environ.get("DSTACK_TEST_SERVER_VERSION", "0.22.5")
PYTHON_VARIABLE = "DSTACK_TEST_SERVER_PYTHON"
_REPO = Path(__file__).resolve().parents[2]
_LAUNCHER = Path(__file__).with_name("fast_start.py")
_FIRST_FLEETS_APPLY = (0, 19, 6)
# Deadlines for a busy machine with two cores; in peace it takes a tenth.
_BOOT_SECONDS = 180.0
_IDLE_SECONDS = 180.0
_END_SECONDS = 30.0
_POLL_SECONDS = 0.1
_REQUEST_SECONDS = 30.0
_TAIL_LINES = 40


class RigError(Exception):
    """The server or its fleet did not come up."""


def server_python(version: str) -> Path:
    """Return the Python of the environment that holds a server."""
    override = os.environ.get(PYTHON_VARIABLE)
    python = Path(override) if override else _REPO / ".venv" / f"server-{version}" / "bin" / "python"
    if not python.exists():
        raise RigError(
            f"there is no dstack server {version} at {python}: run `make test`, or set {PYTHON_VARIABLE}"
        )
    return python


class RealServer:
    """Start a server and its fleet on entry; on exit end every process and delete every file.

    `url`, `token`, `project` and `fleet` are what a client needs. `fast` shortens the pauses of the server's
    background steps, `hosts` is the number of pretended machines, `blocks` how many jobs each can hold and
    `gpus` how many GPUs each claims to have. Errors raise `RigError` with the end of the server's log.
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
    ) -> None:
        self.version = version
        self.token = secrets.token_hex(16)
        self.project = "main"
        self.fleet = "rig"
        self.url = ""
        self.boot_seconds = 0.0
        self.idle_seconds = 0.0
        self._python = python
        self._fast = fast
        self._size = {"hosts": hosts, "blocks": blocks, "gpus": gpus}
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._cleaner: subprocess.Popen[bytes] | None = None
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
    def log_path(self) -> Path:
        """Return the log of the server; it exists until the exit."""
        if self._folder is None:
            raise RigError("the server is not started")
        return self._folder / "server.log"

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of the log, for the message of a failed test."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def start(self) -> None:
        """Start the server, make the fleet and wait until every host is idle."""
        python = self._python or server_python(self.version)
        if shutil.which("ssh") is None:
            raise RigError("the dstack server needs the OpenSSH client (`ssh`) on the PATH")
        # Short, because the server keeps UNIX sockets below it.
        self._folder = Path(tempfile.mkdtemp(prefix="rig-"))
        self._cleaner = processes.start_cleaner(self._folder)
        try:
            began = time.monotonic()
            self._launch(python, self._folder)
            self._wait_until_up()
            self.boot_seconds = time.monotonic() - began
            self._make_fleet(self._folder)
            self.idle_seconds = time.monotonic() - began - self.boot_seconds
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server, the jobs and the hosts, and delete the files."""
        self._session.close()
        try:
            if self._process is not None:
                processes.end(self._process, _END_SECONDS)
            if self._hosts is not None:
                self._hosts.close()
        finally:
            if self._cleaner is not None:
                # The server's SSH connections leave its process group on purpose; the cleaner finds them.
                self._cleaner.communicate(timeout=_END_SECONDS)
            self._process = self._hosts = self._cleaner = self._folder = None

    def _launch(self, python: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        for name in ("home", "t"):
            (folder / name).mkdir()
        env = {
            "PATH": f"{python.parent}:{os.environ.get('PATH', os.defpath)}",
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "t"),
            "DSTACK_SERVER_DIR": str(folder / "server"),
            "DSTACK_SERVER_ADMIN_TOKEN": self.token,
            # Read at import, which the launcher does before the command line sets them.
            "DSTACK_SERVER_HOST": "127.0.0.1",
            "DSTACK_SERVER_PORT": str(port),
            "AWS_EC2_METADATA_DISABLED": "true",
            # Nothing may leave this machine: price lists and registries meet a closed port.
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1,localhost",
        }
        command = [str(python), "-P", str(_LAUNCHER)] if self._fast else [str(python.parent / "dstack")]
        arguments = ["server", "--host", "127.0.0.1", "--port", str(port), "-y"]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=folder,
                start_new_session=True,
            )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _BOOT_SECONDS
        while True:
            self._check_alive()
            try:
                if self._session.get(f"{self.url}/healthcheck", timeout=_REQUEST_SECONDS).ok:
                    return
            except requests.ConnectionError:
                pass
            self._pause(deadline, "the server does not answer")

    def _make_fleet(self, folder: Path) -> None:
        self._hosts = Fleet(self.fleet, **self._size, folder=folder / "jobs", version=self.version)
        spec = self._hosts.spec()
        if self.release >= _FIRST_FLEETS_APPLY:
            self._post("fleets/apply", {"plan": {"spec": spec}, "force": False})
        else:
            self._post("fleets/create", {"spec": spec})
        deadline = time.monotonic() + _IDLE_SECONDS
        while True:
            self._check_alive()
            try:
                missing = waiting_for(self._post("fleets/get", {"name": self.fleet}))
            except RuntimeError as error:
                raise RigError(f"{error}\n{self.log_tail()}") from error
            if not missing:
                return
            self._pause(deadline, ", ".join(missing))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        reply = self._session.post(
            f"{self.url}/api/project/{self.project}/{path}",
            json=body,
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=_REQUEST_SECONDS,
        )
        if not reply.ok:
            raise RigError(f"{path}: {reply.status_code} {reply.text}\n{self.log_tail()}")
        return reply.json()

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise RigError(f"the server exited with {self._process.returncode}\n{self.log_tail()}")

    def _pause(self, deadline: float, complaint: str) -> None:
        if time.monotonic() > deadline:
            raise RigError(f"{complaint}\n{self.log_tail()}")
        time.sleep(_POLL_SECONDS)
