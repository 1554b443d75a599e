"""Processes of Prefect: its server, and others that end together with the test that needs them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A limit for a busy machine; the wait ends as soon as the server answers.
_START_SECONDS = 300.0


def environment(folder: Path) -> dict[str, str]:
    """Return an environment with Prefect's home in ``folder`` and without this process's settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DSTACK_"))}
    return own | {
        "HOME": str(folder),
        "PREFECT_HOME": str(folder / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@contextmanager
def module(
    name: str, *arguments: str, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python module as a separate process."""
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
    """Run a Prefect server and yield the address of its API once it answers."""
    with server_process(port, log=log, environment=environment):
        yield f"http://127.0.0.1:{port}/api"


@contextmanager
def server_process(
    port: int, *, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Prefect server and yield its process once its API answers."""
    where = ("--host", "127.0.0.1", "--port", str(port))
    # Many processes write to one sqlite database, which refuses a writer that waited longer (seconds): then log
    # records, states and artifacts are lost.
    patient = {"PREFECT_SERVER_DATABASE_TIMEOUT": "60", **environment}
    with module("prefect", "server", "start", *where, log=log, environment=patient) as server:
        _wait_until_healthy(f"http://127.0.0.1:{port}/api/health", server, log)
        yield server


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the Prefect server did not start:\n{log.read_text()[-3000:]}")
