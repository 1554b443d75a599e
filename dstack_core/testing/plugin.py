"""The fixtures. pytest imports this file in every project of its environment: it imports only pytest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dstack_core.local import Scenarios, VirtualTime
    from dstack_core.testing.server import DstackServer

_SERVERS = ("dstack_server", "dstack_server_module", "dstack_server_session")
_LEFTOVER = "dstack_leftover"
_CHOICES = ("warn", "fail", "ignore")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's settings."""
    parser.addini(
        _LEFTOVER, "What to do if a test leaves runs unfinished: warn, fail or ignore.", default="warn"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Check the plugin's settings."""
    value = config.getini(_LEFTOVER)
    if value not in _CHOICES:
        raise pytest.UsageError(f"{_LEFTOVER}: expected one of {', '.join(_CHOICES)}, got {value!r}.")


def _serve(request: pytest.FixtureRequest) -> Iterator[DstackServer]:
    from dstack_core.testing.server import DstackServer, environment

    with DstackServer() as server:
        with environment(server):
            yield server
        left = server.unfinished
    action = request.config.getini(_LEFTOVER)
    if left and action != "ignore":
        runs = "\n".join(f"  {run}" for run in left)
        text = f"The test left {len(left)} run(s) unfinished. Stop them, or wait for them:\n{runs}"
        if action == "fail":
            pytest.fail(text, pytrace=False)
        warnings.warn(text, stacklevel=1)


@pytest.fixture
def dstack_server(request: pytest.FixtureRequest) -> Iterator[DstackServer]:
    """An embedded dstack server for one test, to which the environment points meanwhile.

    Sets ``DSTACK_SERVER_URL``, ``DSTACK_PROJECT``, ``DSTACK_TOKEN`` and ``AIRFLOW_CONN_DSTACK_DEFAULT``, and
    restores them at the end.
    """
    if "dstack_time" in request.fixturenames:
        # The server ends before its time does.
        request.getfixturevalue("dstack_time")
    yield from _serve(request)


@pytest.fixture(scope="module")
def dstack_server_module(request: pytest.FixtureRequest) -> Iterator[DstackServer]:
    """One embedded server for the tests of a module; `DstackServer.forget` begins anew."""
    yield from _serve(request)


@pytest.fixture(scope="session")
def dstack_server_session(request: pytest.FixtureRequest) -> Iterator[DstackServer]:
    """One embedded server for all tests of a process; `DstackServer.forget` begins anew."""
    yield from _serve(request)


@pytest.fixture
def dstack_scenario(request: pytest.FixtureRequest) -> Iterator[Scenarios]:
    """What happens to the next runs of the test's server; cleared at the end of the test."""
    name = next((name for name in _SERVERS if name in request.fixturenames), _SERVERS[0])
    scenarios: Scenarios = request.getfixturevalue(name).scenarios
    yield scenarios
    scenarios.clear()


@pytest.fixture
def dstack_time() -> Iterator[VirtualTime]:
    """Virtual time for one test: waits for dstack take no time."""
    from dstack_core.local import VirtualTime

    with VirtualTime() as time:
        yield time
