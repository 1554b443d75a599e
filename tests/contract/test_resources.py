"""Fleets, volumes, secrets and gateways on the embedded server and on real ones, with all that one cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator

import pytest

import dstack_core as dstack
from tests.contract.conftest import Target


@pytest.fixture
def name(client: dstack.Client) -> Iterator[str]:
    """Return the name of a fleet, which is deleted afterwards."""
    name = f"fleet-{uuid.uuid4().hex[:8]}"
    yield name
    client.fleets.delete(name, until="deleted", timeout=120)


def test_a_fleet_without_machines_lives_and_is_deleted(
    client: dstack.Client, target: Target, name: str
) -> None:
    wanted = dstack.FleetConfiguration(name=name, nodes="0..2")
    assert client.fleets.plan(wanted).current is None
    made = client.fleets.apply(wanted, marker="ours")
    assert (made.name, made.marker, made.instances, made.is_active) == (name, "ours", (), True)
    assert client.fleets.apply(wanted, marker="ours").id == made.id
    assert client.fleets.get(name) == client.fleets.apply(wanted)
    assert name in [each.name for each in client.fleets.list()]
    plan = client.fleets.plan(wanted)
    assert plan.current is not None
    assert plan.current.id == made.id
    with pytest.raises(dstack.ResourceNameTakenError, match=r"a fleet of another owner \(ours\)"):
        client.fleets.apply(wanted, marker="theirs")
    with pytest.raises(dstack.ResourceNameTakenError):
        client.fleets.delete(name, marker="theirs")
    assert client.fleets.delete(name, marker="ours", until="deleted", timeout=120) is True
    assert client.fleets.get(name) is None
    assert client.fleets.delete(name) is False


def test_a_fleet_is_changed_in_place_where_the_server_can(
    client: dstack.Client, target: Target, name: str
) -> None:
    made = client.fleets.apply({"name": name, "nodes": "0..2"}, marker="ours")
    more = {"name": name, "nodes": "0..3"}
    if target.release < (0, 19, 6):
        with pytest.raises(dstack.RequestRejectedError, match=r"cannot change it in place: nodes"):
            client.fleets.apply(more, marker="ours")
        return
    changed = client.fleets.apply(more, marker="ours")
    assert (changed.id, changed.marker, changed.configuration["nodes"]["max"]) == (made.id, "ours", 3)


def test_a_wrong_key_of_a_fleet_is_named_by_the_server(client: dstack.Client, name: str) -> None:
    with pytest.raises(dstack.RequestRejectedError, match="bogus"):
        client.fleets.apply({"name": name, "nodes": 0, "bogus": 1})
    assert client.fleets.get(name) is None


def test_secrets_are_set_listed_and_deleted(client: dstack.Client, target: Target) -> None:
    name = f"token_{uuid.uuid4().hex[:8]}"
    if target.release < (0, 19, 17):
        with pytest.raises(dstack.UnsupportedServerError, match=r"needs dstack >= 0\.19\.17"):
            client.secrets.set(name, "first")
        return
    made = client.secrets.set(name, "first")
    assert client.secrets.set(name, "second") == made
    assert made in client.secrets.list()
    assert "first" not in repr(made)
    assert client.secrets.delete(name) is True
    assert client.secrets.delete(name) is False
    assert name not in [each.name for each in client.secrets.list()]


def test_a_project_without_a_gateway_has_none(client: dstack.Client) -> None:
    assert client.gateways.list() == []
    assert client.gateways.get("none") is None


def test_a_volume_that_no_backend_can_have_is_refused(client: dstack.Client, target: Target) -> None:
    name = f"volume-{uuid.uuid4().hex[:8]}"
    wanted = {"name": name, "backend": "slurm", "region": "here", "size": "10GB"}
    with pytest.raises(dstack.RequestRejectedError):
        client.volumes.apply(wanted)
    assert client.volumes.get(name) is None
    assert name not in [each.name for each in client.volumes.list()]
    assert client.volumes.delete(name) is False


def test_a_run_with_a_volume_that_does_not_exist_is_refused(client: dstack.Client, target: Target) -> None:
    name = f"volume-{uuid.uuid4().hex[:8]}"
    with pytest.raises(dstack.RequestRejectedError, match=rf"Volume .*{name}.* not found"):
        client.runs.submit(target.task("true", volumes=[f"{name}:/data"]))


def test_a_volume_is_created_once_mounted_and_deleted(client: dstack.Client, target: Target) -> None:
    name = f"volume-{uuid.uuid4().hex[:8]}"
    wanted = dstack.VolumeConfiguration(name=name, backend="aws", region="us-east-1", size="10GB")
    if target.kind == "real":
        # A server without that cloud creates nothing, or a volume that fails.
        with contextlib.suppress(dstack.RequestRejectedError):
            client.volumes.apply(wanted)
            with pytest.raises(dstack.ResourceFailedError, match="could not be created"):
                client.volumes.wait(name, timeout=120)
        client.volumes.delete(name, until="deleted", timeout=120)
        assert client.volumes.get(name) is None
        return
    made = client.volumes.apply(wanted)
    assert client.volumes.apply(wanted).id == made.id
    ready = client.volumes.wait(name, timeout=60)
    assert (ready.id, ready.backend, ready.region, ready.size) == (made.id, "aws", "us-east-1", 10 * 2**30)
    assert name in [each.name for each in client.volumes.list()]
    with pytest.raises(dstack.ResourceNameTakenError, match=r"a volume of that name has region 'us-east-1'"):
        client.volumes.apply({"name": name, "backend": "aws", "region": "eu-west-1", "size": "10GB"})
    for command in ("echo kept > data/x", "cat data/x"):
        run = client.runs.submit(target.task(command, volumes=[f"{name}:/workflow/data"]))
        assert run.wait(target.timeout, poll_interval=target.poll_interval).succeeded
    assert b"".join(run.logs()).strip() == b"kept"
    assert client.volumes.delete(name, until="deleted", timeout=60) is True
    assert client.volumes.get(name) is None
    assert client.volumes.delete(name) is False


def test_a_run_that_has_ended_is_deleted_and_an_active_one_is_not(
    client: dstack.Client, target: Target
) -> None:
    run = client.runs.submit(target.task("echo started; sleep 600"))
    try:
        with pytest.raises(dstack.RequestRejectedError, match="Cannot delete active runs"):
            client.runs.delete(run.name)
    finally:
        target.stop(run)
    assert run.name in [each.name for each in client.runs.list(all=True, limit=50, status="terminated")]
    client.runs.delete(run.name)
    assert client.runs.get(run.name) is None
    client.runs.delete(run.name)


def test_offers_are_fetched(client: dstack.Client, target: Target) -> None:
    # A real server without a cloud has none.
    offers = client.offers(limit=5)
    assert len(offers) <= 5
    assert offers.total >= len(offers)
    if target.kind == "local":
        assert offers.by_gpu()


def test_the_async_client_does_the_same(target: Target, name: str) -> None:
    async def use() -> None:
        async with target.async_client() as client:
            made = await client.fleets.apply({"name": name, "nodes": "0..1"}, marker="ours")
            assert await client.fleets.get(name) == made
            assert (await client.fleets.plan({"name": name, "nodes": "0..1"})).current is not None
            assert await client.fleets.delete(name, until="deleted", timeout=120) is True
            assert await client.gateways.list() == []
            assert await client.volumes.list() == []
            assert len(await client.offers(limit=1)) <= 1

    asyncio.run(use())
