"""A Prefect server and an embedded dstack server; the settings are made before Prefect is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.provider_prefect import hosts

_HOME = tempfile.mkdtemp(prefix="prefect-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
_PORT = free_port()

for name in [name for name in os.environ if name.startswith(("PREFECT_", "DSTACK_"))]:
    del os.environ[name]
os.environ.update(
    {
        "HOME": _HOME,
        "PREFECT_HOME": str(Path(_HOME) / ".prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{_PORT}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.3",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
)

from prefect.logging.handlers import APILogHandler  # noqa: E402
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings  # noqa: E402
from pydantic import SecretStr  # noqa: E402

from dstack_core import CallbackEvent  # noqa: E402
from dstack_core.local import LocalServer  # noqa: E402
from prefect_dstack import DstackCredentials  # noqa: E402
from tests.provider_prefect.journal import Journal  # noqa: E402


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a real Prefect server and return the address of its API."""
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        hosts.prefect_server(_PORT, log=log, environment=os.environ) as address,
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield address
        # Otherwise the last records are sent at the end of the process, to a server that has ended.
        APILogHandler().flush()


@pytest.fixture
def dstack() -> Iterator[LocalServer]:
    """Run an embedded dstack server for one test."""
    with LocalServer(step_seconds=0.02) as server:
        yield server


@pytest.fixture
def credentials(dstack: LocalServer) -> DstackCredentials:
    """Return a block for the embedded server."""
    return DstackCredentials(
        server_url=dstack.url, project_name=dstack.project, user_token=SecretStr(dstack.token)
    )


@pytest.fixture
def events() -> Iterator[list[CallbackEvent]]:
    """The list of a ``Journal``, empty before and after."""
    Journal.events.clear()
    yield Journal.events
    Journal.events.clear()
