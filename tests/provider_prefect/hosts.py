"""Processes of Prefect: its server, and others that are ended with whoever needs them."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def module(
    name: str, *arguments: str, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module of Python in a process of its own."""
    command = [sys.executable, "-m", name, *arguments]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def prefect_server(port: int, *, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a Prefect server and give the address of its API once it answers."""
    address = f"http://127.0.0.1:{port}/api"
    where = ("--host", "127.0.0.1", "--port", str(port))
    with module("prefect", "server", "start", *where, log=log, environment=environment) as server:
        _wait_until_healthy(f"{address}/health", server, log)
        yield address


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the Prefect server did not start:\n{log.read_text()[-3000:]}")
