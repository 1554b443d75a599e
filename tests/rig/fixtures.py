"""Fixtures that need a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rig.server import RealServer


@pytest.fixture(scope="session")
def real_server() -> Iterator[RealServer]:
    """Start one server for the whole test session."""
    with RealServer() as server:
        yield server
