"""Start a Redis server of our own: an empty directory, a free loopback port, a new password."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port
from tests.provider_airflow.support import wait_for


class RedisMissing(RuntimeError):
    """An error: Redis is needed and is not installed."""


class Redis:
    """A server at ``url``; it keeps its data when it is stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port, self._password = free_port(), secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start it; return when it answers."""
        settings = {
            "bind": "127.0.0.1",
            "port": self._port,
            "requirepass": self._password,
            "dir": self._directory,
            # Each write is in a file at once, as a broker needs it.
            "appendonly": "yes",
            "save": "",
        }
        config = self._directory / "redis.conf"
        config.write_text("".join(f'{name} "{value}"\n' for name, value in settings.items()))
        output = self._directory / "output"
        with output.open("ab") as log:
            process = self._process = subprocess.Popen(
                [_program("redis-server"), config], stdout=log, stderr=log, start_new_session=True
            )

        def answers() -> bool:
            assert process.poll() is None, f"redis-server ended: {output.read_text()[-3000:]}"
            return "Ready to accept connections" in output.read_text()

        wait_for("start of Redis", answers, 60)

    def stop(self, *, at_once: bool = False) -> None:
        """Let it write its data and end, or kill it ``at_once``."""
        if self._process is not None:
            (self._process.kill if at_once else self._process.terminate)()
            self._process.wait(60)
            self._process = None
            (self._directory / "output").unlink()


@contextmanager
def running_redis() -> Iterator[Redis]:
    """Run an empty server. Raises ``RedisMissing``."""
    _program("redis-server")
    directory = Path(tempfile.mkdtemp(prefix="redis-"))
    server = Redis(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RedisMissing(f"There is no {name} on the PATH. Install the package redis-server.")
    return found
