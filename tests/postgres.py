"""Start a Postgres server of our own: a new directory, a free loopback port, a new password."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ports import free_port

# Debian keeps the server's programs away from the PATH.
_DEBIAN = Path("/usr/lib/postgresql")
_USER = "postgres"
# A limit for a busy machine; the wait ends as soon as the server answers.
_START_SECONDS = 120.0


class PostgresMissing(RuntimeError):
    """An error: Postgres was requested and cannot be started here."""


class Postgres:
    """A server with an empty database at ``url``; it keeps its data when it is stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port, self._password = free_port(), secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql+psycopg2://{_USER}:{self._password}@127.0.0.1:{self._port}/postgres"

    def create(self) -> None:
        """Create its data directory. Raises ``PostgresMissing``."""
        secret = self._directory / "password"
        secret.write_text(self._password)
        access = ("-U", _USER, "--auth=scram-sha-256", f"--pwfile={secret}")
        subprocess.run(
            [_program("initdb"), "-D", self._data, *access, "--no-sync"],
            check=True,
            capture_output=True,
            timeout=120,
            **_as_owner_of(self._directory, secret),
        )

    def start(self) -> None:
        """Start it; return when it answers."""
        output = self._directory / "output"
        with output.open("ab") as log:
            process = self._process = subprocess.Popen(
                [_program("postgres"), "-D", self._data, *_settings(self._port, self._directory)],
                stdout=log,
                stderr=log,
                **_as_owner_of(self._directory),
            )
        asked = [_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]

        deadline = time.monotonic() + _START_SECONDS
        while subprocess.run(asked, timeout=60, check=False).returncode != 0:
            assert process.poll() is None, f"postgres ended: {output.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"postgres does not answer: {output.read_text()[-3000:]}"
            time.sleep(0.1)

    def stop(self, *, at_once: bool = False) -> None:
        """Let it end its clients' sessions and then itself, or drop everything ``at_once``."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
            self._process.wait(60)
            self._process = None

    @property
    def _data(self) -> Path:
        return self._directory / "data"


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Run a server with an empty database. Raises ``PostgresMissing``."""
    # Look for all programs before anything is created.
    for name in ("initdb", "postgres", "pg_isready"):
        _program(name)
    # Outside of pytest's directories, which only their owner can enter.
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = Postgres(directory)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def postgres_url() -> Iterator[str]:
    """Run a server with an empty database and yield its SQLAlchemy URL. Raises ``PostgresMissing``."""
    with running_postgres() as server:
        yield server.url


def _settings(port: int, directory: Path) -> list[str]:
    told = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": directory,
        # Nothing here outlives the tests.
        "fsync": "off",
        "full_page_writes": "off",
        "synchronous_commit": "off",
    }
    return [part for name, value in told.items() for part in ("-c", f"{name}={value}")]


def _program(name: str) -> str:
    versions = sorted(_DEBIAN.glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, versions)))
    if found is None:
        raise PostgresMissing(
            f"AIRFLOW_TEST_DATABASE is 'postgres', but there is no {name} on the PATH or under {_DEBIAN}; "
            "install the package postgresql, or leave the variable out to use sqlite"
        )
    return found


def _as_owner_of(*paths: Path) -> dict[str, Any]:
    """Make the server's user, never root, the owner of the paths; return the subprocess options for that user."""
    options: dict[str, Any] = {"cwd": paths[0], "env": {**os.environ, "LC_ALL": "C.UTF-8"}}
    if os.geteuid() != 0:
        return options
    try:
        owner = pwd.getpwnam(_USER)
    except KeyError:
        raise PostgresMissing(
            f"Postgres does not run as root, and there is no user {_USER}; the package postgresql makes one"
        ) from None
    for path in paths:
        os.chown(path, owner.pw_uid, owner.pw_gid)
    return {**options, "user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
