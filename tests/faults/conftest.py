"""An embedded server, and proxies that inject faults, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dstack_core.local import LocalServer
from tests.faults import matrix
from tests.faults.life import Stage
from tests.settings import no_settings_of_this_machine


@pytest.fixture(scope="session")
def server() -> Iterator[LocalServer]:
    with LocalServer(step_seconds=0.0, stop_grace_seconds=0.2) as server:
        with server.client() as client:
            # The server generates its user's key with the first request, which takes long.
            client.user()
        yield server


# A module's scope, not the session's: the stage shortens the pauses between retries while it exists.
@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with matrix.stage() as stage:
        yield stage


_no_settings_of_this_machine = pytest.fixture(autouse=True)(no_settings_of_this_machine)
