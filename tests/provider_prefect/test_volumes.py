"""Volumes of flow runs: created once, mounted by its runs, and deleted by ``delete_volume`` alone."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.runtime import flow_run

import dstack_core as core
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    _cancellation,
    acreate_volume,
    adelete_volume,
    create_volume,
    delete_volume,
    run_task,
)
from prefect_dstack.reaper import reap

from .support import cancelled_when

pytestmark = pytest.mark.usefixtures("prefect_server")

AWS: dict[str, Any] = {"name": "data", "backend": "aws", "region": "us-east-1", "size": "10GB"}


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_core._flow.volumes.PAUSE_SECONDS", 0.1)


def volumes(server: LocalServer) -> dict[str, core.Volume]:
    with server.client() as client:
        return {volume.name: volume for volume in client.volumes.list()}


def test_runs_share_a_volume_and_it_is_deleted(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    @flow(name="nightly")
    def nightly() -> dict[str, Any]:
        volume = create_volume({**AWS, "tags": {"team": "nlp"}}, credentials)
        mounted = {"volumes": [f"{volume['name']}:/workflow/data"]}
        for command in ("echo kept > data/x", "grep kept data/x"):
            run_task({"type": "task", "commands": [command], **mounted}, credentials, poll_interval=0.1)
        assert volume["marker"].startswith(f"prefect:flow_run/{flow_run.id}/volume/")
        assert volumes(dstack)[volume["name"]].tags["team"] == "nlp"
        assert delete_volume(volume, credentials)
        assert not delete_volume(volume, credentials)
        return volume

    made = nightly()
    assert made["name"].startswith("nightly-data-")
    assert (made["status"], made["backend"], made["region"]) == ("active", "aws", "us-east-1")
    assert made["size"] == 10 * 2**30
    assert f"Volume {made['name']} is active in aws us-east-1." in caplog.text
    assert f"Volume {made['name']} is deleted." in caplog.text
    assert f"Volume {made['name']} does not exist." in caplog.text
    assert volumes(dstack) == {}


def test_the_next_try_of_a_flow_finds_its_volume(dstack: LocalServer, credentials: DstackCredentials) -> None:
    seen: list[str] = []

    @flow(retries=1)
    async def retried() -> None:
        volume = await acreate_volume(AWS, credentials)
        seen.append(volume["volume_id"])
        if len(seen) == 1:
            raise ValueError("once")
        assert await adelete_volume(volume, credentials)

    asyncio.run(retried())
    assert len(seen) == 2
    assert len(set(seen)) == 1
    assert volumes(dstack) == {}


def test_a_volume_that_is_kept_is_shared_and_no_reaper_deletes_one(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def keeping() -> str:
        return str(create_volume(AWS, credentials, keep=True)["volume_id"])

    @flow
    def own() -> str:
        return str(create_volume(AWS, credentials)["name"])

    assert len({keeping(), keeping()}) == 1
    name = own()
    assert reap(credentials, min_age=0, stop_unknown=True) == []
    assert set(volumes(dstack)) == {"data", name}

    @flow
    def ending() -> bool:
        return delete_volume("data", credentials)

    assert ending()
    assert set(volumes(dstack)) == {name}


def test_a_volume_of_another_owner_is_left_alone(dstack: LocalServer, credentials: DstackCredentials) -> None:
    with dstack.client() as client:
        client.volumes.apply(AWS)

    @flow
    def naming() -> None:
        with pytest.raises(core.ResourceNameTakenError, match=r"a volume of that name has (no|other) tags"):
            create_volume(AWS, credentials, name="data")
        with pytest.raises(core.ResourceNameTakenError, match="got a volume of another owner, 'data'"):
            delete_volume({"name": "data", "marker": "prefect:flow_run/x"}, credentials)

    @flow
    async def anaming() -> None:
        with pytest.raises(core.ResourceNameTakenError, match="another owner"):
            await adelete_volume({"name": "data", "marker": "prefect:flow_run/x"}, credentials)

    naming()
    asyncio.run(anaming())
    assert set(volumes(dstack)) == {"data"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"keep": "no"}, "keep: expected True or False"),
        ({"timeout": 0}, "timeout: expected more than 0 seconds"),
        ({"name": "Not a name"}, "name: expected 2 to 41 lower-case"),
        ({"name": 3}, "name: expected the name of a volume"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_created(
    given: dict[str, Any], text: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def wrong() -> None:
        with pytest.raises(core.ConfigurationError, match=text):
            create_volume(AWS, credentials, **given)
        unnamed = {key: value for key, value in AWS.items() if key != "name"}
        with pytest.raises(core.ConfigurationError, match="name: expected one for a volume with keep=True"):
            create_volume(unnamed, credentials, keep=True)
        with pytest.raises(core.ConfigurationError, match="or what create_volume returned"):
            delete_volume({"id": 3}, credentials)

    wrong()
    assert volumes(dstack) == {}


@pytest.mark.parametrize("twin", [False, True])
def test_a_volume_that_fails_is_deleted_again(
    twin: bool, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_core.models.volumes.Volume.has_failed", property(lambda volume: True))
    monkeypatch.setattr("dstack_core.models.volumes.Volume.is_active", property(lambda volume: False))

    @flow
    def failing() -> None:
        with pytest.raises(core.ResourceFailedError, match="could not be created"):
            create_volume(AWS, credentials)

    @flow
    async def afailing() -> None:
        with pytest.raises(core.ResourceFailedError, match="could not be created"):
            await acreate_volume(AWS, credentials)

    if twin:
        asyncio.run(afailing())
    else:
        failing()
    assert any(request.path.endswith("/volumes/delete") for request in dstack.requests)


def test_a_cancellation_ends_the_wait_for_a_volume(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_core.models.volumes.Volume.is_active", property(lambda volume: False))
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 0.3)
    ids: list[UUID] = []

    @flow
    def waiting() -> None:
        ids.append(UUID(flow_run.id))
        create_volume.submit(AWS, credentials).wait()

    with cancelled_when(lambda: volumes(dstack), ids):
        waiting(return_state=True)
    assert len(volumes(dstack)) == 1
