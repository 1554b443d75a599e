"""Servers whose containers are reached in different ways, and what attaching to their runs needs."""

from __future__ import annotations

import contextlib
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import dstack_core as dstack
from tests.rig.server import RealServer
from tests.rig.server_process import ServerAddress

LINES = 2400
HALF = f"line {LINES // 2}\r\n".encode()
EXPECTED = [f"line {number}" for number in range(1, LINES + 1)]


class Way:
    """A server whose containers are reached in one of the ways, and what its runs need."""

    def __init__(self, server: RealServer) -> None:
        self.server = server
        self._needs: dict[str, Any] = {"user": "root"}
        if server.release >= (0, 19, 3):
            self._needs["fleets"] = [server.fleet]

    def arguments(self) -> dict[str, Any]:
        server = self.server
        return {"server_url": server.url, "project_name": server.project, "user_token": server.token}

    def client(self) -> dstack.Client:
        return dstack.Client(**self.arguments())

    def task(self, *commands: str, ports: list[Any] | None = None, **more: Any) -> dstack.Task:
        return dstack.Task(commands=list(commands), ports=ports, **self._needs, **more)


def behind(name: str, running: RealServer) -> RealServer:
    """Return a server whose containers are reached that way."""
    if name == "one hop":
        return RealServer(running.version, sshproxy=True)
    at = ServerAddress(running.version, running.url, running.token, str(running.log_path))
    return RealServer(at=at, jump_host=True, project=f"jump-{uuid.uuid4().hex[:8]}")


def lines(data: bytes) -> list[str]:
    return [line for line in data.decode().splitlines() if line.startswith("line ")]


def counting(*flags: Path) -> str:
    """Return a command that prints the lines in equal parts and waits for a file between two of them."""
    size = LINES // (len(flags) + 1)
    parts = [
        f"for i in $(seq {first} {first + size - 1}); do echo line $i; done"
        for first in range(1, LINES, size)
    ]
    waits = [f"until [ -e {flag} ]; do sleep 0.05; done" for flag in flags]
    return "; ".join(step for pair in zip(parts, [*waits, "true"], strict=True) for step in pair)


def polled(way: Way, run: dstack.Run) -> bytes:
    with way.client() as client:
        found = client.runs.get(run.name)
        assert found is not None
        return b"".join(found.logs())


def fetch(port: int) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(100):
        # The program's port may open a moment later than its first log line appears.
        with (
            contextlib.suppress(OSError),
            opener.open(f"http://127.0.0.1:{port}/index.html", timeout=30) as reply,
        ):
            body: bytes = reply.read()
            return body
    raise AssertionError("the port was never reached")


def new_key(path: Path) -> Path:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(*form))
    return path
