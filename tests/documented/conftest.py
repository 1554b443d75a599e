"""A server that stores what it was sent, to check what each documented parameter changes in a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

import dstack_core as dstack
from dstack_core.local import LocalServer


@dataclass(frozen=True)
class Bench:
    """A client of an embedded server, and access to what that server received."""

    server: LocalServer
    client: dstack.Client

    def arrived(self, run: dstack.Run) -> dict[str, Any]:
        """Return the run_spec as the server stores it."""
        reply = requests.post(
            f"{self.server.url}/api/project/{self.server.project}/runs/get",
            json={"id": run.id},
            headers={"Authorization": f"Bearer {self.server.token}"},
            timeout=30,
        )
        reply.raise_for_status()
        spec: dict[str, Any] = reply.json()["run_spec"]
        return spec

    def configuration(self, task: dstack.ConfigurationLike, **options: Any) -> dict[str, Any]:
        """Submit and stop a run, and return the configuration that arrived."""
        run = self.client.runs.submit(task, **options)
        run.stop(abort=True)
        found: dict[str, Any] = self.arrived(run)["configuration"]
        return found

    def arguments(self) -> dict[str, Any]:
        return {
            "server_url": self.server.url,
            "project_name": self.server.project,
            "user_token": self.server.token,
        }


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with LocalServer() as server, server.client() as client:
        yield Bench(server, client)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home directory, and remove this machine's settings from the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DSTACK_SERVER_URL", "DSTACK_PROJECT", "DSTACK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
