"""Fixtures of the tests of the embedded server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dstack_core.local import LocalServer
from tests.local.support import Api

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def shared_server() -> Iterator[LocalServer]:
    with LocalServer(step_seconds=0.01, retry_seconds=0.02, stop_grace_seconds=0.5) as server:
        yield server


@pytest.fixture
def api(shared_server: LocalServer) -> Api:
    return Api(shared_server)


@pytest.fixture
def name() -> str:
    """Return a run name that no other test uses."""
    return f"run-{next(_numbers)}"


@pytest.fixture
def make() -> Iterator[Callable[..., Api]]:
    """Return a function that starts a private server."""
    servers: list[LocalServer] = []

    def start(**options: Any) -> Api:
        server = LocalServer(**{"step_seconds": 0.01, "retry_seconds": 0.02, **options})
        servers.append(server.start())
        return Api(server)

    yield start
    for server in servers:
        server.stop()
