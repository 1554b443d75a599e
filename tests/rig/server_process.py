"""The dstack server itself, as a child process."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import requests

from tests.ports import free_port
from tests.rig import processes

DEFAULT_VERSION = os.environ.get("DSTACK_TEST_SERVER_VERSION", "0.22.5")
PYTHON_VARIABLE = "DSTACK_TEST_SERVER_PYTHON"
SHARED_VARIABLE = "DSTACK_TEST_SHARED_SERVER"
_REPO = Path(__file__).resolve().parents[2]
_LAUNCHER = Path(__file__).with_name("fast_start.py")
# Deadlines in seconds for a busy machine with two cores; on an idle one it takes a tenth.
_BOOT_SECONDS = 180.0
_END_SECONDS = 30.0
_POLL_SECONDS = 0.1
_REQUEST_SECONDS = 30.0
_TAIL_LINES = 40


class RigError(Exception):
    """A server or fleet that could not be started or used."""


@dataclass(frozen=True)
class ServerAddress:
    """The address of a running server, and what is needed to use it."""

    version: str
    url: str
    token: str = field(repr=False)
    log_path: str

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of the log, for the message of a failed test."""
        try:
            return "\n".join(Path(self.log_path).read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def variables(self) -> dict[str, str]:
        """Return the environment variables by which another process finds the server."""
        return {SHARED_VARIABLE: json.dumps(asdict(self))}


def shared_server() -> ServerAddress | None:
    """Return the server that another process started for this one."""
    text = os.environ.get(SHARED_VARIABLE)
    return ServerAddress(**json.loads(text)) if text else None


def server_python(version: str) -> Path:
    """Return the Python of the environment that holds a server."""
    override = os.environ.get(PYTHON_VARIABLE)
    python = Path(override) if override else _REPO / ".venv" / f"server-{version}" / "bin" / "python"
    if not python.exists():
        raise RigError(
            f"there is no dstack server {version} at {python}: run `make test`, or set {PYTHON_VARIABLE}"
        )
    return python


class ServerProcess:
    """A server process with its files below `folder`.

    `fast` shortens the pauses of its background steps, `images` makes every image look plain to it
    instead of asking a registry, `impatient` makes it fail a job soon that it cannot start or reach; `variables` are
    added to its environment.
    """

    def __init__(
        self,
        version: str,
        folder: Path,
        python: Path | None = None,
        *,
        fast: bool = True,
        images: bool = False,
        impatient: bool = False,
        variables: dict[str, str] | None = None,
    ) -> None:
        if shutil.which("ssh") is None:
            raise RigError("the dstack server needs the OpenSSH client (`ssh`) on the PATH")
        self._python = python or server_python(version)
        self._folder = folder
        self._port = free_port()
        url = f"http://127.0.0.1:{self._port}"
        self.address = ServerAddress(version, url, secrets.token_hex(16), str(folder / "server.log"))
        switches = {"RIG_FAST": fast, "RIG_IMAGES": images, "RIG_IMPATIENT": impatient}
        self._switches = {name: "1" for name, on in switches.items() if on}
        self._variables = variables or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, with the state of an earlier one in the folder, and wait until it answers."""
        for name in ("home", "t"):
            (self._folder / name).mkdir(exist_ok=True)
        command = [str(self._python.parent / "dstack")]
        if self._switches:
            command = [str(self._python), "-P", str(_LAUNCHER)]
        arguments = ["server", "--host", "127.0.0.1", "--port", str(self._port), "-y"]
        with Path(self.address.log_path).open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self._folder,
                start_new_session=True,
            )
        self._wait_until_up()

    def stop(self, *, kill: bool = False) -> None:
        """Terminate the process, or ``kill`` it."""
        if self._process is not None:
            if kill:
                self._process.kill()
            processes.end(self._process, _END_SECONDS)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self._python.parent}:{os.environ.get('PATH', os.defpath)}",
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
            "HOME": str(self._folder / "home"),
            "TMPDIR": str(self._folder / "t"),
            "DSTACK_SERVER_DIR": str(self._folder / "server"),
            "DSTACK_SERVER_ADMIN_TOKEN": self.address.token,
            # The server reads these when it is imported, which the launcher does before the command line sets them.
            "DSTACK_SERVER_HOST": "127.0.0.1",
            "DSTACK_SERVER_PORT": str(self._port),
            "AWS_EC2_METADATA_DISABLED": "true",
            # No request may leave this machine: those for price lists and registries meet a closed port.
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1,localhost",
            **self._switches,
            **self._variables,
        }

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _BOOT_SECONDS
        url = f"{self.address.url}/api/users/get_my_user"
        token = {"Authorization": f"Bearer {self.address.token}"}
        with requests.Session() as session:
            session.trust_env = False
            while True:
                self.check_alive()
                try:
                    # Only this server accepts the token, so another server on the port is not mistaken for it.
                    if session.post(url, json={}, headers=token, timeout=_REQUEST_SECONDS).ok:
                        return
                except requests.RequestException:
                    pass
                if time.monotonic() > deadline:
                    raise RigError(f"the server does not answer\n{self.address.log_tail()}")
                time.sleep(_POLL_SECONDS)

    def check_alive(self) -> None:
        """Raise `RigError` if the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise RigError(f"the server exited with {self._process.returncode}\n{self.address.log_tail()}")
