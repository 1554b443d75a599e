"""Start a Postgres server of our own: a new directory, a free loopback port, a new password."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.provider_airflow.support import wait_for

# Debian keeps the server's programs away from the PATH.
_DEBIAN = Path("/usr/lib/postgresql")
_USER = "postgres"


class PostgresMissing(RuntimeError):
    """Say that Postgres was asked for and cannot be started here."""


@contextmanager
def postgres_url() -> Iterator[str]:
    """Run a server with an empty database; give its SQLAlchemy URL. Raises ``PostgresMissing``."""
    initdb, server, is_ready = _program("initdb"), _program("postgres"), _program("pg_isready")
    # Outside of pytest's directories: those are for their owner alone.
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    password, port = secrets.token_hex(16), free_port()
    process: subprocess.Popen[bytes] | None = None
    try:
        secret = directory / "password"
        secret.write_text(password)
        data, output = directory / "data", directory / "output"
        options = _as_owner_of(directory, secret)
        subprocess.run(
            [initdb, "-D", data, "-U", _USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"],
            check=True,
            capture_output=True,
            timeout=120,
            **options,
        )
        with output.open("wb") as log:
            process = subprocess.Popen(
                [server, "-D", data, *_settings(port, directory)], stdout=log, stderr=log, **options
            )
        asked = [is_ready, "-q", "-h", "127.0.0.1", "-p", str(port)]

        def answers() -> bool:
            assert process is not None
            assert process.poll() is None, f"postgres ended: {output.read_text()[-3000:]}"
            return subprocess.run(asked, timeout=10, check=False).returncode == 0

        wait_for("answer of Postgres", answers, 60)
        yield f"postgresql+psycopg2://{_USER}:{password}@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            # Interrupted, it ends its clients' sessions and then itself.
            process.send_signal(signal.SIGINT)
            process.wait(60)
        shutil.rmtree(directory, ignore_errors=True)


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
    """Give the paths to who is to run the server, and return the subprocess options for that: never root."""
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
