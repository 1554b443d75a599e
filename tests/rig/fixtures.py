"""Fixtures that need a real server."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.rig.server import RealServer
from tests.rig.server_process import shared_server


@pytest.fixture(scope="session")
def real_server() -> Iterator[RealServer]:
    """Start one server for the whole test session, or join the one that `tests.rig.shared` started."""
    shared = shared_server()
    if shared is None:
        server = RealServer(images=True)
    else:
        server = RealServer(at=shared, project=f"tests-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
    with server:
        yield server
