"""The servers that every contract test runs against: the embedded one and a real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.rig.fixtures import real_server
from tests.rig.server import RealServer

__all__ = ["real_server"]

_STOP_SECONDS = 180.0


def stop_and_wait(run: dstack.Run, *, abort: bool = False, poll_interval: float = 0.5) -> dstack.Outcome:
    """Stop a run and wait for its end."""
    run.stop(abort=abort)
    return run.wait(_STOP_SECONDS, poll_interval=poll_interval)


@dataclass(frozen=True)
class Target:
    """A server and what a task needs to run there.

    `release` is its version; for the embedded server, the version it imitates. `server` is None for the embedded one.
    """

    kind: str
    url: str
    token: str = field(repr=False)
    project: str
    needs: dict[str, Any]
    timeout: float
    release: tuple[int, ...]
    server: RealServer | None = None

    def client(self, **changes: Any) -> dstack.Client:
        return dstack.Client(**self.arguments(**changes))

    def async_client(self, **changes: Any) -> dstack.AsyncClient:
        return dstack.AsyncClient(**self.arguments(**changes))

    def arguments(self, **changes: Any) -> dict[str, Any]:
        return {"server_url": self.url, "project_name": self.project, "user_token": self.token} | changes

    def task(self, *commands: str, **more: Any) -> dict[str, Any]:
        return {"type": "task", "commands": list(commands), **self.needs, **more}

    def reported_exit_status(self, exit_status: int) -> int | None:
        """Return an exit status as this server's version reports it (PROTOCOL 2.2: since 0.19.9)."""
        return exit_status if self.release >= (0, 19, 9) else None

    def stop(self, run: dstack.Run, *, abort: bool = False) -> dstack.Outcome:
        """Stop a run and wait for its end; the wait repeats a stop that the server dropped."""
        return stop_and_wait(run, abort=abort, poll_interval=self.poll_interval)

    async def stop_async(self, run: dstack.AsyncRun) -> dstack.Outcome:
        """Do what `stop` does."""
        await run.stop()
        return await run.wait(_STOP_SECONDS, poll_interval=self.poll_interval)

    @property
    def poll_interval(self) -> float:
        return 0.1 if self.kind == "local" else 0.5


@pytest.fixture(scope="session")
def _local() -> Iterator[Target]:
    with LocalServer() as server:
        yield Target("local", server.url, server.token, server.project, {}, 60, (0, 22, 5))


@pytest.fixture(scope="session")
def _real(real_server: RealServer) -> Target:
    needs: dict[str, Any] = {"user": "root"}
    if real_server.release >= (0, 19, 3):
        needs["fleets"] = [real_server.fleet]
    return Target(
        "real",
        real_server.url,
        real_server.token,
        real_server.project,
        needs,
        400,
        real_server.release,
        real_server,
    )


@pytest.fixture(params=["local", pytest.param("real", marks=pytest.mark.real)], scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    """Run the same test with the embedded server, then with a real dstack server."""
    chosen: Target = request.getfixturevalue(f"_{request.param}")
    return chosen


@pytest.fixture
def client(target: Target) -> Iterator[dstack.Client]:
    with target.client() as client:
        yield client
