"""dstack's own client, its command line and its Python API, with a separate home directory."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.rig.server_process import DEFAULT_VERSION, server_python

# Each command imports all of dstack, which takes seconds on a busy machine.
_SECONDS = 240


class Server(Protocol):
    """What a client has to know of a server."""

    @property
    def url(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def token(self) -> str: ...


@dataclass(frozen=True)
class Reply:
    """The output and the exit status of a command."""

    status: int
    text: str


class OfficialClient:
    """The commands of dstack's environment, run against a server."""

    def __init__(self, server: Server, home: Path) -> None:
        self._home = home
        self._python = server_python(DEFAULT_VERSION)
        self.variables = {
            "HOME": str(home),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
            # No request may leave this machine, so the check for a newer version gets a closed port.
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1,localhost",
        }
        (home / ".dstack").mkdir()
        (home / ".dstack" / "config.yml").write_text(
            f"projects:\n- {{name: {server.project}, url: '{server.url}', token: {server.token}, default: true}}\n"
        )

    def configuration(self, name: str, text: str) -> str:
        """Write a configuration and return its name for ``-f``."""
        path = self._home / f"{name}.dstack.yml"
        path.write_text(f"name: {name}\n{text}")
        return path.name

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command of the command line."""
        return subprocess.Popen(
            [str(self._python.parent / "dstack"), *arguments],
            cwd=self._home, env=self.variables, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str) -> Reply:
        """Run a command of the command line; it must not end with a traceback."""
        return self._finish(self.start(*arguments))

    def python(self, code: str) -> Reply:
        """Run a program that uses the Python API."""
        return self._finish(
            subprocess.Popen(
                [str(self._python), "-c", code],
                cwd=self._home,
                env=self.variables,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )

    def _finish(self, process: subprocess.Popen[str]) -> Reply:
        try:
            text, _ = process.communicate(timeout=_SECONDS)
        finally:
            process.kill()
        assert "Traceback" not in text, text
        assert "Unexpected error" not in text, text
        # Not the digits alone: an id may have them.
        assert "405 Client Error" not in text, text
        return Reply(process.returncode, text)
