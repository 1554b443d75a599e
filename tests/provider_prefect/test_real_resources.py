"""A flow's fleet, secrets and budget on a real dstack server; the fleet and a secret on one that answers late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from prefect import flow
from pydantic import SecretStr

from prefect_dstack import (
    DstackCredentials,
    create_fleet,
    delete_fleet,
    dstack_fleet,
    run_task,
    sync_secrets,
)
from prefect_dstack.budgets import DstackBudget
from tests.provider_airflow.slow_proxy import SlowProxy
from tests.rig.fixtures import real_server
from tests.rig.server import RealServer

__all__ = ["real_server"]
pytestmark = [pytest.mark.real, pytest.mark.usefixtures("prefect_server")]

VALUE = "hf_0123456789abcdef"
EMPTY: dict[str, Any] = {"nodes": "0..2"}


def block(real: RealServer, url: str = "") -> DstackCredentials:
    token = SecretStr(real.token)
    return DstackCredentials(server_url=url or real.url, project_name=real.project, user_token=token)


@pytest.fixture
def slow(real_server: RealServer) -> Iterator[DstackCredentials]:
    """Return credentials for the server behind a proxy with replies that take 2 s."""
    port = urlsplit(real_server.url).port
    assert port is not None
    with SlowProxy(port, 2.0) as proxy:
        yield block(real_server, proxy.url)


def left(real: RealServer) -> tuple[list[str], list[str]]:
    """Return the names of the fleets beside the rig's own, and of the secrets."""
    with block(real).get_client() as client:
        fleets = [one.name for one in client.fleets.list() if not one.has_ended and not one.is_terminating]
        return [name for name in fleets if name != real.fleet], [one.name for one in client.secrets.list()]


def test_a_fleet_and_a_secret_live_as_long_as_their_block(
    real_server: RealServer, slow: DstackCredentials
) -> None:
    @flow
    def nightly() -> None:
        fleet = create_fleet(EMPTY, slow)
        with dstack_fleet(EMPTY, slow) as own, sync_secrets({"HF_TOKEN": SecretStr(VALUE)}, slow) as env:
            (name,) = left(real_server)[1]
            assert env == {"HF_TOKEN": f"${{{{ secrets.{name} }}}}"}
            assert sorted(left(real_server)[0]) == sorted([fleet["name"], own.name])
            assert delete_fleet(fleet, slow)

    nightly()
    assert left(real_server) == ([], [])


def test_a_run_within_its_budget_gets_the_secret(
    real_server: RealServer, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = block(real_server)
    command = "echo got ${#HF_TOKEN} characters"
    task = {"type": "task", "commands": [command], "user": "root", "fleets": [real_server.fleet]}

    @flow
    def train() -> dict[str, Any]:
        assert DstackBudget(20, credentials=credentials).allows(planned=5)
        with sync_secrets({"HF_TOKEN": SecretStr(VALUE)}, credentials) as env:
            return dict(run_task(task, credentials, env=env, max_cost=5, poll_interval=0.5))

    outcome = train()
    assert outcome["status"] == "done"
    assert f"got {len(VALUE)} characters" in caplog.text
    assert VALUE not in caplog.text
    with credentials.get_client() as client:
        run = client.runs.get(outcome["run_name"])
        assert run is not None
        assert VALUE not in json.dumps(run.env)
    assert left(real_server)[1] == []
