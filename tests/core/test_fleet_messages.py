"""What errors about fleets report: each choice once, and why machines did not come in time."""

from __future__ import annotations

import asyncio
import re

import pytest

import dstack_core as dstack
from dstack_core.local import LocalServer

LATE = (
    r"^Fleet train did not have {machines} within 0\.3 s\. I.*(pending|no_offers|no machine).*\. "
    r"Ask for less or pay more, or wait longer\.$"
)


def test_each_choice_of_a_field_is_named_once() -> None:
    expected = "spot_policy: expected 'spot', 'on-demand' or 'auto', got 'cheap'."
    with pytest.raises(dstack.ConfigurationError, match=re.escape(expected)):
        dstack.load_fleet({"nodes": 1, "spot_policy": "cheap"})


@pytest.mark.parametrize(("nodes", "machines"), [(1, "1 ready machine"), (2, "2 ready machines")])
def test_machines_that_do_not_come_are_shown_with_their_reason(nodes: int, machines: str) -> None:
    with LocalServer(step_seconds=0.02) as server, server.client() as client:
        client.fleets.apply({"nodes": nodes, "resources": {"gpu": "9000GB"}}, name="train")
        with pytest.raises(dstack.WaitTimeoutError, match=LATE.format(machines=machines)):
            client.fleets.wait("train", nodes, timeout=0.3)


def test_the_async_client_shows_the_reason() -> None:
    async def wait(server: LocalServer) -> None:
        async with dstack.AsyncClient(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            await client.fleets.apply({"nodes": 1, "resources": {"gpu": "9000GB"}}, name="train")
            await client.fleets.wait("train", 1, timeout=0.3)

    with (
        LocalServer(step_seconds=0.02) as server,
        pytest.raises(dstack.WaitTimeoutError, match=LATE.format(machines="1 ready machine")),
    ):
        asyncio.run(wait(server))


def test_a_fleet_has_a_page() -> None:
    with LocalServer() as server, server.client() as client:
        assert client.fleet_url("7a0e") == f"{server.url}/projects/{server.project}/fleets/7a0e"
