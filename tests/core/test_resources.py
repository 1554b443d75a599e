"""Volumes, secrets, gateways and offers: created once, read with every server, secrets never shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._flow.queries import list_runs, run_filter
from dstack_core._flow.retry import RetryBudget, TimeLimit, retrying, within
from dstack_core._flow.steps import Flow
from dstack_core._flow.volumes import apply_volume, delete_volume, wait_until_active
from dstack_core._operations import Operations
from dstack_core._resource_operations import ResourceOperations
from dstack_core._wire.api import Api
from dstack_core._wire.project_items import ProjectItemsApi, volume_configuration
from dstack_core.errors import (
    ConfigurationError,
    RequestRejectedError,
    ResourceFailedError,
    ResourceNameTakenError,
    UnsupportedServerError,
    WaitTimeoutError,
)
from tests.core.scripted import LOST, MISSING, Driver, Script, reply, run_json

API = Api("http://server", "main")
ITEMS = ProjectItemsApi(API)
WANTED = {"name": "data", "backend": "aws", "region": "eu-west-1", "size": "100GB"}
NONE = reply({"detail": [{"msg": "Resource not found", "code": "resource_not_exists"}]}, 400)


def volume(status: str = "active", **configuration: Any) -> dict[str, Any]:
    return {
        "id": "v-1",
        "name": "data",
        "project_name": "main",
        "status": status,
        "status_message": "quota exceeded" if status == "failed" else None,
        "created_at": "2026-11-28T03:30:43.789790+00:00",
        "configuration": {"type": "volume", **WANTED, "size": 100.0} | configuration,
        "attachments": [{"instance": {"name": "train-0"}}],
        "cost": 1.5,
    }


def refusal(text: str, code: str = "error") -> Any:
    return reply({"detail": [{"msg": text, "code": code}]}, 400)


def applied(driver: Driver, **changes: Any) -> Flow[Any]:
    configuration = volume_configuration(dstack.VolumeConfiguration.model_validate(WANTED | changes), "data")
    budget = RetryBudget(30.0, driver.clock)
    return retrying(apply_volume(ITEMS, configuration, budget), budget)


class Volumes:
    """A server with at most one volume."""

    def __init__(self, *losses: Any) -> None:
        self.losses = list(losses)
        self.volume: dict[str, Any] | None = None
        self.created = 0

    def get(self, body: dict[str, Any]) -> Any:
        return NONE if self.volume is None else reply(self.volume)

    def create(self, body: dict[str, Any]) -> Any:
        loss = self.losses.pop(0) if self.losses else ""
        if loss == "before":
            return LOST
        if self.volume is not None:
            return refusal("Resource exists", "resource_exists")
        if loss and loss != "after":
            return loss
        self.created += 1
        self.volume = volume("submitted")
        return LOST if loss == "after" else reply(self.volume)

    def script(self) -> Script:
        return Script(
            volumes__get=[self.get],
            volumes__create=[self.create],
            volumes__delete=[reply(None)],
        )


@pytest.mark.parametrize("losses", [(), ("before",), ("after",), ("before", "after")])
def test_a_missing_volume_is_created_once(driver: Driver, losses: tuple[str, ...]) -> None:
    server = Volumes(*losses)
    made = driver.run(applied(driver), server.script())
    assert (made.id, server.created) == ("v-1", 1)
    assert (made.size, made.backend, made.region) == (100 * 2**30, "aws", "eu-west-1")
    assert (made.attached_to, made.cost, made.status_message) == (("train-0",), 1.5, None)


def test_a_volume_that_exists_is_returned(driver: Driver) -> None:
    server = Volumes()
    server.volume = volume()
    script = server.script()
    assert driver.run(applied(driver), script).is_active
    assert script.paths() == ["volumes/get"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"region": "us-east-1"}, "region 'eu-west-1'"),
        ({"backend": "gcp", "tags": {"a": "b"}}, "backend 'aws' and no tags"),
        ({"tags": {"a": "b"}}, "no tags"),
        ({"availability_zone": "eu-west-1a"}, "no availability zone"),
    ],
)
def test_another_volume_of_that_name_is_left_alone(
    driver: Driver, changes: dict[str, Any], text: str
) -> None:
    server = Volumes()
    server.volume = volume()
    with pytest.raises(ResourceNameTakenError, match=rf"a volume of that name has {text} in project main on"):
        driver.run(applied(driver, **changes), server.script())


@pytest.mark.parametrize("size", ["-5GB", "0", 0, "0GB", "big", float("nan"), float("inf"), "5 XB"])
def test_a_size_that_no_disk_has_is_refused_before_any_request(size: Any) -> None:
    for form in (WANTED | {"size": size}, dstack.VolumeConfiguration(**(WANTED | {"size": size}))):
        with pytest.raises(
            dstack.ConfigurationError, match=r"size: expected a size above 0, such as .*, got"
        ):
            dstack.load_volume(form)


@pytest.mark.parametrize("size", ["100GB", "1.5 TB", "512mb", "7", 7, 0.5])
def test_every_form_of_a_size_is_accepted(size: Any) -> None:
    assert dstack.load_volume(WANTED | {"size": size}).size == size


@pytest.mark.parametrize(
    ("given", "fine"),
    [
        ({"backend": "aws"}, False),
        ({"backend": "kubernetes"}, False),
        ({"backend": "aws", "volume_id": "vol-1"}, True),
        ({"backend": "kubernetes", "claim_name": "data"}, True),
        ({"backend": "lium"}, True),
    ],
)
def test_a_new_volume_has_a_size_where_its_backend_needs_one(given: dict[str, Any], fine: bool) -> None:
    if fine:
        assert dstack.load_volume(given).size is None
    else:
        with pytest.raises(dstack.ConfigurationError, match=r'expected size such as "100GB" .* got neither'):
            dstack.load_volume(given)


def test_a_refusal_of_a_volume_is_raised(driver: Driver) -> None:
    server = Volumes(refusal("Backend aws not available.", "backend_not_available"))
    with pytest.raises(RequestRejectedError, match="Backend aws not available"):
        driver.run(applied(driver), server.script())


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (reply(volume()), None),
        (reply(volume("failed")), r"Volume data could not be created: quota exceeded\. Correct"),
        (NONE, "Volume data is no longer in project main on http://server"),
    ],
)
def test_a_volume_is_waited_for(driver: Driver, end: Any, error: str | None) -> None:
    script = Script(volumes__get=[reply(volume("submitted")), reply(volume("provisioning")), end])
    flow = wait_until_active(ITEMS, "data")
    if error is None:
        assert driver.run(flow, script).is_active
    else:
        with pytest.raises(ResourceFailedError, match=error):
            driver.run(flow, script)
    assert len(driver.clock.slept) == 2


def test_a_wait_for_a_volume_ends_with_its_limit(driver: Driver) -> None:
    flow = within(wait_until_active(ITEMS, "data"), TimeLimit(10, "too long", "", driver.clock))
    with pytest.raises(WaitTimeoutError, match="too long"):
        driver.run(flow, Script(volumes__get=[reply(volume("submitted"))]))


@pytest.mark.parametrize("until_deleted", [True, False])
def test_a_volume_is_deleted(driver: Driver, until_deleted: bool) -> None:
    script = Script(volumes__get=[reply(volume()), reply(volume()), NONE], volumes__delete=[reply(None)])
    assert driver.run(delete_volume(ITEMS, "data", until_deleted=until_deleted), script) is True
    assert script.bodies("volumes/delete") == [{"names": ["data"]}]
    assert len(script.bodies("volumes/get")) == (3 if until_deleted else 1)


def test_a_missing_volume_needs_no_deletion(driver: Driver) -> None:
    script = Script(volumes__get=[NONE])
    assert driver.run(delete_volume(ITEMS, "data", until_deleted=True), script) is False


def operations(driver: Driver) -> ResourceOperations:
    return ResourceOperations(Operations(API, 30.0, clock=driver.clock))


def info(release: str = "0.22.5") -> Any:
    return reply({"server_version": release})


def test_a_secret_is_set_and_its_value_is_not_kept(driver: Driver) -> None:
    stored = reply({"id": "s-1", "name": "token", "value": "s3cr3t"})
    script = Script(server__get_info=[info()], secrets__create_or_update=[LOST, stored])
    made = driver.run(operations(driver).set_secret("token", "s3cr3t"), script)
    assert made == dstack.Secret("token", "s-1")
    assert script.bodies("secrets/create_or_update") == [{"name": "token", "value": "s3cr3t"}] * 2


def test_secrets_are_listed_and_deleted(driver: Driver) -> None:
    listed = reply([{"id": "s-1", "name": "token", "value": None}])
    script = Script(
        server__get_info=[info()],
        secrets__list=[listed],
        secrets__delete=[reply(None), refusal("Secrets not found: token", "resource_not_exists")],
    )
    ours = operations(driver)
    assert driver.run(ours.list_secrets(), script) == [dstack.Secret("token", "s-1")]
    assert driver.run(ours.delete_secret("token"), script) is True
    assert driver.run(ours.delete_secret("token"), script) is False


@pytest.mark.parametrize("call", ["set", "list", "delete"])
def test_an_old_server_has_no_secrets(driver: Driver, call: str) -> None:
    ours = operations(driver)
    flows: dict[str, Callable[[], Flow[Any]]] = {
        "set": lambda: ours.set_secret("token", "value"),
        "list": ours.list_secrets,
        "delete": lambda: ours.delete_secret("token"),
    }
    script = Script(server__get_info=[info("0.18.44")])
    with pytest.raises(UnsupportedServerError, match=r"project secrets: needs dstack >= 0\.19\.17"):
        driver.run(flows[call](), script)
    assert script.paths() == ["server/get_info"]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("two words", "s3cr3t", "name: expected 1 to 200 letters"),
        ("token", "", "value: expected a text for the secret token, got an empty text"),
        ("token", 123456789, "value: expected a text for the secret token, got int"),
    ],
)
def test_a_wrong_secret_is_refused_without_its_value(name: str, value: Any, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error) as caught:
        operations(Driver("sync")).set_secret(name, value)
    assert "s3cr3t" not in str(caught.value)
    assert "123456789" not in str(caught.value)


def test_gateways_are_read(driver: Driver) -> None:
    item = {
        "id": "g-1",
        "name": "main-gateway",
        "project_name": "main",
        "status": "running",
        "created_at": "2026-11-28T03:30:43Z",
        "configuration": {"backend": "aws", "region": "eu-west-1"},
        "wildcard_domain": "*.example.com",
        "hostname": "1.2.3.4",
        "default": True,
    }
    script = Script(gateways__list=[reply([item])], gateways__get=[reply(item), NONE])
    ours = operations(driver)
    (gateway,) = driver.run(ours.list_gateways(), script)
    assert (gateway.backend, gateway.domain, gateway.is_default) == ("aws", "*.example.com", True)
    assert driver.run(ours.get_gateway("main-gateway"), script) == gateway
    assert driver.run(ours.get_gateway("none"), script) is None


def offer(
    price: float, gpu: str | None = "A100", count: int = 1, region: str = "eu", memory: int = 80
) -> Any:
    one = {"name": gpu, "memory_mib": memory * 1024, "vendor": "nvidia"}
    resources = {"cpus": 8, "memory_mib": 65536, "gpus": [one] * count if gpu else [], "spot": False}
    return {
        "backend": "aws",
        "region": region,
        "price": price,
        "availability": "available",
        "instance": {"name": f"type-{price}", "resources": resources},
    }


def plan(*offers: Any) -> Any:
    return reply({"job_plans": [{"job_spec": {}, "offers": list(offers), "total_offers": 7, "max_price": 9}]})


@pytest.mark.parametrize(
    ("release", "keys"),
    [("0.18.44", set()), ("0.19.40", {"max_offers"}), ("0.22.5", {"max_offers", "for_offers_only"})],
)
def test_offers_are_asked_for_as_the_server_knows(driver: Driver, release: str, keys: set[str]) -> None:
    script = Script(server__get_info=[info(release)], runs__get_plan=[plan(offer(1.0), offer(2.0))])
    found = driver.run(operations(driver).offers({"resources": "24GB..", "regions": ["eu"]}, 1), script)
    assert ([each.price_per_hour for each in found], found.total, len(found)) == ([1.0], 7, 1)
    (body,) = script.bodies("runs/get_plan")
    assert set(body) - {"run_spec"} == keys
    configuration = body["run_spec"]["configuration"]
    assert configuration["resources"] == {"gpu": "24GB.."}
    assert (configuration["commands"], configuration["regions"]) == ([":"], ["eu"])


def test_without_resources_any_machine_is_an_offer(driver: Driver) -> None:
    script = Script(server__get_info=[info()], runs__get_plan=[plan()])
    assert not list(driver.run(operations(driver).offers({}, 10), script))
    resources = script.bodies("runs/get_plan")[0]["run_spec"]["configuration"]["resources"]
    assert resources == {"cpu": "1..", "memory": "0.1..", "disk": None, "gpu": {"count": "0.."}}


def test_offers_are_grouped_by_gpu() -> None:
    offers = (offer(4.0, count=2, region="us"), offer(1.0, "T4", memory=16), offer(2.0), offer(0.1, None))
    script = Script(server__get_info=[info()], runs__get_plan=[plan(*offers)])
    found = Driver("sync").run(operations(Driver("sync")).offers({}, 10), script)
    groups = found.by_gpu()
    assert [(each.gpu, each.counts, each.min_price_per_hour) for each in groups] == [
        (None, (0,), 0.1),
        ("T4", (1,), 1.0),
        ("A100", (1, 2), 2.0),
    ]
    assert (groups[2].max_price_per_hour, groups[2].regions) == (4.0, ("eu", "us"))
    assert groups[2].gpu_memory == 80 * 2**30


@pytest.mark.parametrize(
    ("wanted", "limit", "error"),
    [
        ({"max_price": -1}, 10, "max_price: expected USD per hour above 0"),
        ({"spot_policy": "sometimes"}, 10, "spot_policy"),
        ({"resources": True}, 10, "resources"),
        ({}, 0, "limit: expected a number above 0"),
    ],
)
def test_a_wrong_wish_for_offers_is_refused(wanted: Any, limit: int, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error):
        operations(Driver("sync")).offers(wanted, limit)


def listed(driver: Driver, **options: Any) -> tuple[list[str], Script]:
    pages = [
        [run_json("running", f"r{n}", f"dag:{n % 2}", run_id=f"id-{n}") for n in range(start, start + 100)]
        for start in (0, 100, 200)
    ]
    script = Script(runs__list=[reply(each) for each in pages], projects__get=[MISSING])
    wanted = run_filter(options.pop("status", None), options.pop("marker_prefix", None))
    runs = driver.run(list_runs(API, all=True, is_wanted=wanted, **options), script)
    return [run.name for run in runs], script


@pytest.mark.parametrize(("limit", "pages"), [(1, 1), (100, 1), (101, 2), (150, 2)])
def test_no_more_pages_are_read_than_the_limit_needs(driver: Driver, limit: int, pages: int) -> None:
    names, script = listed(driver, limit=limit)
    assert (len(names), len(script.paths())) == (limit, pages)


def test_runs_are_filtered_by_marker_and_status(driver: Driver) -> None:
    names, script = listed(driver, limit=60, marker_prefix="dag:1")
    assert (names[:3], len(script.paths())) == (["r1", "r3", "r5"], 2)
    assert listed(driver, limit=3, status="running")[0] == ["r0", "r1", "r2"]
    assert listed(driver, limit=3, status=["running", "failed"])[0] == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"status": "runing"}, "status: expected one of 'pending', "),
        ({"status": ["running", "x"]}, "status: expected one of 'pending', "),
        ({"marker_prefix": 3}, "marker_prefix: expected the beginning of a marker, got 3"),
        ({"limit": 0}, "limit: expected a number above 0"),
    ],
)
def test_a_wrong_filter_is_refused(options: Any, error: str) -> None:
    client = dstack.Client(server_url="http://127.0.0.1:9", project_name="main", user_token="t")
    with client, pytest.raises(ConfigurationError, match=error):
        client.runs.list(**options)


def test_a_fleet_of_hosts_is_sent_with_its_key(tmp_path: Path, driver: Driver) -> None:
    from dstack_core._attach.keys import LoginKey, _generate

    key = LoginKey("new", _generate())
    path = tmp_path / "id"
    with path.open("w") as file:
        key.private.write_private_key(file)
    hosts = {"user": "ubuntu", "identity_file": str(path), "hosts": ["10.0.0.1", {"hostname": "10.0.0.2"}]}
    flow = operations(driver).plan_fleet({"type": "fleet", "name": "own", "ssh_config": hosts})
    answer: dict[str, Any] = {
        "spec": {"configuration": {}},
        "current_resource": None,
        "offers": [],
        "action": "create",
    }
    script = Script(fleets__get_plan=[reply(answer)])
    assert driver.run(flow, script).action == "create"
    sent = script.bodies("fleets/get_plan")[0]["spec"]["configuration"]["ssh_config"]
    assert sent["ssh_key"] == {"public": key.public_line, "private": path.read_text()}
    assert sent["hosts"] == hosts["hosts"]
    assert "PRIVATE KEY" not in repr(flow)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ({"type": "task"}, "configuration: expected `type: fleet`, got 'task'"),
        (
            3,
            "configuration: expected a FleetConfiguration, a mapping or the path of a file with `type: fleet`",
        ),
        (
            {"nodes": 1},
            "name: expected 2 to 41 lower-case letters, digits and dashes, .* for the fleet, got None",
        ),
        ({"name": "A", "nodes": 1}, "name: expected 2 to 41 lower-case letters"),
        ("/nowhere/fleet.dstack.yml", "configuration: /nowhere/fleet.dstack.yml: No such file"),
        (
            {"name": "own", "ssh_config": {"identity_file": "/nowhere/id"}},
            "ssh_config.identity_file: /nowhere/id",
        ),
    ],
)
def test_a_wrong_fleet_is_refused(source: Any, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error):
        operations(Driver("sync")).apply_fleet(source, name=None, marker=None, retry_budget=None)


def test_a_fleet_and_a_volume_are_read_from_files(tmp_path: Path) -> None:
    from dstack_core import load_fleet, load_volume

    fleet = tmp_path / "fleet.dstack.yml"
    fleet.write_text("type: fleet\nname: train\nnodes: 0..2\nresources: {gpu: 24GB}\nlater_key: [1]\n")
    volume_file = tmp_path / "volume.dstack.yml"
    volume_file.write_text(json.dumps({"type": "volume", **WANTED}))
    loaded = load_fleet(fleet)
    assert (loaded.name, loaded.nodes, loaded.model_dump()["later_key"]) == ("train", "0..2", [1])
    assert load_fleet(loaded) is loaded
    assert load_volume(volume_file).size == "100GB"


def test_the_collections_of_both_clients_reach_the_same_calls() -> None:
    # Each method once, with a server that refuses all: both clients raise the same error for each call.
    def calls(client: Any) -> list[Any]:
        return [
            client.fleets.list(),
            client.volumes.list(),
            client.secrets.list(),
            client.gateways.list(),
        ]

    arguments: dict[str, Any] = {
        "server_url": "http://127.0.0.1:9",
        "project_name": "main",
        "user_token": "t",
        "retry_budget": 0,
    }
    with dstack.Client(**arguments) as client:
        for name in ("fleets", "volumes", "secrets", "gateways"):
            with pytest.raises(dstack.ServerUnreachableError):
                getattr(client, name).list()

    async def twin() -> list[Any]:
        async with dstack.AsyncClient(**arguments) as client:
            return await asyncio.gather(*calls(client), return_exceptions=True)

    assert [type(each) for each in asyncio.run(twin())] == [dstack.ServerUnreachableError] * 4
