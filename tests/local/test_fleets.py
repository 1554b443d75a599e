"""Fleets of the embedded server: the replies of a real 0.22.5, and instances that come, work and go."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dstack_core.local import LocalServer
from tests.local.support import Api, differences, ending, recording, wait_until

GONE = (400, "resource_not_exists", "Resource not found")
CLOUD_KEYS = (
    "['nodes', 'reservation', 'tags', 'resources', 'backends', 'regions', 'availability_zones', "
    "'instance_types', 'spot_policy', 'max_price']"
)


def fleet(name: str | None = "f1", nodes: Any = "0..2", profile: Any = None, **configuration: Any) -> Any:
    configuration = {"type": "fleet", "nodes": nodes, **configuration}
    if name is not None:
        configuration["name"] = name
    profile = profile or {"name": "default"}
    return {"configuration": configuration, "profile": profile, "configuration_path": "mine:1"}


def apply(api: Api, spec: Any, seen: Any = None, force: bool = False) -> Any:
    plan = {"spec": spec} if seen is None else {"spec": spec, "current_resource": seen}
    return api.ok("{p}/fleets/apply", {"plan": plan, "force": force})


def refusal(api: Api, path: str, body: Any) -> tuple[int, str, str]:
    reply = api.call(path, body)
    detail = reply.json()["detail"][0]
    return reply.status_code, detail["code"], detail["msg"]


def refused(api: Api, spec: Any, seen: Any = None, force: bool = False) -> str:
    plan = {"spec": spec} if seen is None else {"spec": spec, "current_resource": seen}
    status, code, message = refusal(api, "{p}/fleets/apply", {"plan": plan, "force": force})
    assert (status, code) == (400, "error")
    return message


def get(api: Api, name: str = "f1") -> Any:
    return api.ok("{p}/fleets/get", {"name": name})


def instances(api: Api, name: str = "f1") -> list[tuple[int, str]]:
    return [(one["instance_num"], one["status"]) for one in get(api, name)["instances"]]


def wait_instances(api: Api, *wanted: tuple[int, str], name: str = "f1") -> Any:
    wait_until(lambda: instances(api, name) == list(wanted))
    return get(api, name)["instances"]


def delete(api: Api, name: str = "f1") -> None:
    assert api.ok("{p}/fleets/delete", {"names": [name]}) is None
    wait_until(lambda: api.call("{p}/fleets/get", {"name": name}).status_code == 400)


@pytest.fixture(scope="module")
def private_key() -> str:
    key = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return key.decode()


def ssh(name: str, key: str, *hosts: Any) -> Any:
    config = {
        "user": "ubuntu",
        "ssh_key": {"public": "ssh-ed25519 AAAA", "private": key},
        "hosts": list(hosts),
    }
    return fleet(name, None, ssh_config=config)


def test_a_fleet_is_planned_created_updated_and_deleted_as_on_a_real_server(
    make: Callable[..., Api],
) -> None:
    api = make(instance_seconds=0.02)
    assert api.ok("{p}/fleets/list") == []
    assert refusal(api, "{p}/fleets/get", {"name": "no"}) == GONE
    plan = api.ok("{p}/fleets/get_plan", {"spec": fleet()})
    assert (plan["project_name"], plan["user"], plan["action"]) == ("main", "admin", "create")
    assert plan["current_resource"] is None
    assert plan["effective_spec"]["configuration"]["nodes"] == {"min": 0, "max": 2}
    assert (plan["total_offers"], plan["max_offer_price"], plan["offers"][0]["price"]) == (1, 1.2, 1.2)

    created = apply(api, fleet())
    assert (created["name"], created["status"], created["instances"]) == ("f1", "active", [])
    assert created["spec"]["configuration_path"] == "mine:1"
    assert refused(api, fleet()) == (
        "Failed to apply plan. Resource has been changed. Try again or use force apply."
    )
    assert api.call("{p}/fleets/create", {"spec": fleet()}).status_code == 405
    seen = get(api)
    assert seen == created

    more = fleet(nodes="0..3")
    plan = api.ok("{p}/fleets/get_plan", {"spec": more})
    assert (plan["action"], plan["current_resource"]) == ("update", seen)
    assert "has been changed" in refused(api, more)
    updated = apply(api, more, seen)
    assert (updated["id"], updated["created_at"]) == (seen["id"], seen["created_at"])
    assert updated["spec"]["configuration"]["nodes"] == {"min": 0, "max": 3}
    assert "has been changed" in refused(api, fleet(backends=["aws"]), seen), "what it saw is old"
    final = apply(api, fleet(backends=["aws"]), get(api))
    assert final["spec"]["configuration"]["backends"] == ["aws"]

    for name in ("f1", "nope"):
        assert api.ok("{p}/fleets/delete_instances", {"name": name, "instance_nums": [0]}) is None
    assert api.ok("{p}/fleets/delete", {"names": ["nope"]}) is None
    assert api.ok("{p}/fleets/delete", {"names": ["f1"]}) is None
    wait_until(lambda: api.call("{p}/fleets/get", {"name": "f1"}).status_code == 400)
    assert refusal(api, "{p}/fleets/get", {"name": "f1"}) == GONE
    assert api.ok("{p}/fleets/get", {"id": seen["id"]})["status"] == "terminated"
    assert [one["id"] for one in api.ok("fleets/list", {"project_name": "main"})] == [seen["id"]]
    assert api.ok("fleets/list", {"only_active": True}) == []
    assert api.ok("fleets/list", {"project_name": "other"}) == []
    assert api.ok("{p}/fleets/list", {}) == []
    assert api.ok("instances/list", {"project_names": ["main"]}) == []
    assert apply(api, fleet())["id"] != seen["id"], "the name is free again"


def test_replies_have_the_keys_of_a_real_server(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.02)
    recorded = recording("fleets_apply_elastic_0.22.5")
    assert (
        differences(api.ok("{p}/fleets/apply", recorded["request"]["json"]), recorded["response"]["json"])
        == []
    )


def test_lists_are_paged_newest_first(make: Callable[..., Api]) -> None:
    api = make()
    made = [apply(api, fleet(name)) for name in ("f1", "f2", "f3")]
    assert [one["name"] for one in api.ok("{p}/fleets/list")] == ["f3", "f2", "f1"]
    assert [one["name"] for one in api.ok("fleets/list", {"limit": 2})] == ["f3", "f2"]
    after = {"prev_created_at": made[1]["created_at"], "prev_id": made[1]["id"]}
    assert [one["name"] for one in api.ok("fleets/list", after)] == ["f1"]
    assert [one["name"] for one in api.ok("fleets/list", {**after, "ascending": True})] == ["f3"]
    assert api.call("fleets/list", {"limit": 101}).status_code == 422
    assert api.call("fleets/list").status_code == 422


def test_a_fleet_without_a_name_gets_one(make: Callable[..., Api]) -> None:
    api = make()
    one, other = apply(api, fleet(None)), apply(api, fleet(None))
    assert one["name"] != other["name"]
    assert one["spec"]["configuration"]["name"] == one["name"]
    assert api.ok("{p}/fleets/get_plan", {"spec": fleet(None)})["current_resource"] is None


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"nodes": None}, "No ssh_config or nodes specified"),
        ({"name": "F_"}, "Resource name should match regex '^[a-z][a-z0-9-]{1,40}$'"),
        ({"env": {"A": "b"}}, "Backend fleet configuration does not support the following fields: ['env']"),
        ({"ssh_config": {"hosts": ["a"]}}, "ssh_config and nodes are mutually exclusive"),
        ({"nodes": None, "ssh_config": {"hosts": ["a"]}}, "No ssh key specified for host a"),
        (
            {"nodes": None, "ssh_config": {"hosts": ["a"], "ssh_key": {"public": "x"}}},
            "No ssh user specified for host a",
        ),
        (
            {"nodes": None, "ssh_config": {"hosts": ["a"], "user": "u", "ssh_key": {"public": "x"}}},
            "Private key not provided",
        ),
        (
            {
                "nodes": None,
                "ssh_config": {"hosts": ["a"], "user": "u", "ssh_key": {"public": "x", "private": "zz"}},
            },
            "Unsupported key type. The key type should be RSA, ECDSA, or Ed25519 and should not be "
            "encrypted with passphrase.",
        ),
        (
            {"nodes": None, "ssh_config": {"hosts": ["a"]}, "tags": {"a": "b"}, "retry": True},
            "SSH fleet configuration does not support the following fields: ['retry', 'tags']",
        ),
    ],
)
def test_configurations_are_refused_with_the_words_of_a_real_server(
    api: Api, configuration: Any, message: str
) -> None:
    spec = (
        fleet("refused", **configuration)
        if "name" not in configuration
        else fleet(**{"name": "", **configuration})
    )
    assert refused(api, spec) == message
    assert refusal(api, "{p}/fleets/get_plan", {"spec": spec}) == (400, "error", message)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"nodes": "2..1"}, "Value error, max must not be less than min"),
        ({"nodes": {"min": -1}}, "Value error, min cannot be negative"),
        ({"nodes": "zz"}, "Input should be a valid integer, unable to parse string as an integer"),
        ({"nodes": {"min": 2, "target": 1}}, "Value error, target must not be be less than min"),
        ({"nodes": {"target": 3, "max": 2}}, "Value error, max must not be less than target"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
        ({"idle_duration": "soon"}, "Value error, Cannot parse the duration soon"),
        ({"backends": ["local"]}, None),
        ({"ssh_config": {"hosts": [{"hostname": "h", "internal_ip": "8.8.8.8"}]}}, None),
        ({"ssh_config": {"hosts": ["h"], "network": "8.8.8.0/24"}}, None),
    ],
)
def test_what_does_not_fit_the_schema_is_a_422(api: Api, configuration: Any, message: str | None) -> None:
    reply = api.call("{p}/fleets/get_plan", {"spec": fleet("x1", **configuration)})
    assert reply.status_code == 422
    detail = reply.json()["detail"][0]
    assert detail["loc"][:3] == ["body", "spec", "configuration"]
    assert message in (None, detail["msg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"idle_duration": "5m"},
            f"Failed to update fields ['idle_duration']. Can only update {CLOUD_KEYS}.",
        ),
        (
            {"blocks": 2, "retry": True},
            f"Failed to update fields ['blocks', 'retry']. Can only update {CLOUD_KEYS}.",
        ),
        (
            {"profile": {"name": "other"}},
            "Failed to update fields ['configuration_path', 'profile', 'merged_profile']. "
            "Can only update ['configuration', 'configuration_path', 'merged_profile'].",
        ),
    ],
)
def test_what_cannot_change_is_refused(api: Api, name: str, change: Any, message: str) -> None:
    apply(api, fleet(name))
    spec = {**fleet(name, **change), "configuration_path": "mine:2"}
    assert refused(api, spec, get(api, name)) == message
    assert refused(api, spec, force=True) == message
    assert api.ok("{p}/fleets/get_plan", {"spec": spec})["action"] == "create"
    changed = {**fleet(name, tags={"a": "b"}, resources={"gpu": 1}), "configuration_path": "mine:2"}
    stored = apply(api, changed, force=True)["spec"]
    assert stored["configuration"]["tags"] == {"a": "b"}
    assert stored["configuration_path"] == "mine:2"


def test_instances_come_up_and_stay_until_the_fleet_is_deleted(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.2)
    created = apply(api, fleet(nodes="2..3"))
    assert [(one["name"], one["status"], one["price"]) for one in created["instances"]] == [
        ("f1-0", "pending", None), ("f1-1", "pending", None),
    ]  # fmt: skip
    wait_instances(api, (0, "provisioning"), (1, "provisioning"))
    first, _ = wait_instances(api, (0, "idle"), (1, "idle"))
    assert (first["backend"], first["region"], first["price"]) == ("remote", "local", 1.2)
    assert first["instance_type"]["resources"]["cpus"] == 2
    assert (first["fleet_name"], first["total_blocks"], first["busy_blocks"]) == ("f1", 1, 0)
    recorded = recording("fleets_apply_ssh_0.22.5")["response"]["json"]["instances"][0]
    assert differences(first, recorded) == []
    assert api.ok("{p}/instances/get", {"id": first["id"]}) == first
    assert refusal(api, "{p}/instances/get", {"id": created["id"]}) == GONE
    listed = api.ok("instances/list", {"fleet_ids": [created["id"]]})
    assert {one["name"] for one in listed} == {"f1-0", "f1-1"}

    assert api.ok("{p}/fleets/delete_instances", {"name": "f1", "instance_nums": [0]}) is None
    assert instances(api) == [(0, "terminating"), (1, "idle")]
    wait_instances(api, (1, "idle"))
    gone = api.ok("{p}/instances/get", {"id": first["id"]})
    assert (gone["status"], gone["termination_reason"]) == ("terminated", "terminated_by_user")

    assert api.ok("{p}/fleets/delete", {"names": ["f1"]}) is None
    assert get(api)["status"] == "terminating"
    wait_until(lambda: api.call("{p}/fleets/get", {"name": "f1"}).status_code == 400)
    assert {one["status"] for one in api.ok("instances/list", {})} == {"terminated"}
    assert api.ok("instances/list", {"only_active": True}) == []
    assert api.ok("instances/list", {"project_names": ["other"]}) == []


def test_more_and_fewer_nodes_are_an_update(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.01)
    apply(api, fleet(nodes="0..2"))
    apply(api, fleet(nodes="2..3"), get(api))
    wait_instances(api, (0, "idle"), (1, "idle"))
    apply(api, fleet(nodes="0..1"), force=True)
    wait_instances(api, (0, "idle"))


def test_idle_instances_beyond_the_minimum_go_after_the_idle_duration(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.01)
    apply(api, fleet(nodes={"min": 1, "target": 3, "max": 3}, idle_duration=0))

    def listed() -> set[str | None]:
        return {one["termination_reason"] for one in api.ok("instances/list", {})}

    wait_until(lambda: listed() == {None, "idle_timeout"} and len(instances(api)) == 1)
    assert instances(api)[0][1] == "idle"
    assert {one["termination_reason_message"] for one in api.ok("instances/list", {})} == {
        None,
        "Instance idle for 0s",
    }


def test_a_fleet_that_finds_no_machine_reports_it(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.01)
    spec = fleet(nodes=1, resources={"gpu": "H100"})
    assert api.ok("{p}/fleets/get_plan", {"spec": spec})["total_offers"] == 0
    apply(api, spec)
    (found,) = wait_instances(api, (0, "terminated"))
    assert (found["termination_reason"], found["price"]) == ("no_offers", None)
    delete(api)


def test_hosts_become_instances_and_their_keys_are_never_shown(
    make: Callable[..., Api], private_key: str
) -> None:
    api = make(instance_seconds=0.01)
    other = {"hostname": "host-b", "blocks": 4, "user": "root", "port": 2222}
    spec = ssh("lab", private_key, "host-a", other)
    plan = api.ok("{p}/fleets/get_plan", {"spec": spec})
    assert (plan["offers"], plan["action"]) == ([], "create")
    created = apply(api, spec)
    first, second = wait_instances(api, (0, "idle"), (1, "idle"), name="lab")
    assert (first["hostname"], first["backend"], first["region"], first["price"]) == (
        "host-a",
        "remote",
        "remote",
        0.0,
    )
    assert (second["hostname"], second["total_blocks"]) == ("host-b", 4)
    assert len(first["instance_type"]["resources"]["gpus"]) == 8
    shown = json.dumps([plan, created, get(api, "lab"), api.ok("fleets/list", {})])
    assert "PRIVATE KEY" not in shown
    assert created["spec"]["configuration"]["ssh_config"]["ssh_key"] is None
    created["spec"]["configuration"]["ssh_config"]["hosts"].remove("host-a")
    assert differences(created, recording("fleets_apply_ssh_0.22.5")["response"]["json"]) == []
    assert refused(api, ssh("twice", private_key, "host-b")) == (
        "Instances [host-b] are already assigned to a fleet."
    )
    run = api.run("on-lab", "echo $DSTACK_GPUS_NUM", fleets=["lab"])
    assert (run["status"], run["fleet"]) == ("done", {"id": created["id"], "name": "lab"})
    assert run["cost"] == 0.0

    changed = ssh("lab", private_key, "host-a", {**other, "blocks": 2})
    assert refused(api, changed, get(api, "lab")) == "Hosts configuration changed, cannot update: ['host-b']"
    apply(api, ssh("lab", private_key, other, "host-c"), get(api, "lab"))
    wait_instances(api, (1, "idle"), (2, "idle"), name="lab")
    to_cloud = {**fleet("lab"), "profile": {"name": "default"}}
    assert refused(api, to_cloud, force=True) == "Fleet type changed from SSH to Cloud, cannot update"
    apply(api, fleet("cloud"))
    assert refused(api, ssh("cloud", private_key, "host-d"), force=True) == (
        "Fleet type changed from Cloud to SSH, cannot update"
    )


def test_a_run_uses_the_idle_instance_of_the_fleet_it_names(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.01)
    created = apply(api, fleet(nodes="1..2"))
    wait_instances(api, (0, "idle"))
    plan = api.ok(
        "{p}/runs/get_plan",
        {"run_spec": {"configuration": {"type": "task", "commands": ["true"], "fleets": ["f1"]}}},
    )
    assert [one["availability"] for one in plan["job_plans"][0]["offers"]] == ["idle", "available"]
    api.apply("first", "sleep 600", fleets=["f1"])
    run = api.wait("first", "running")
    assert run["fleet"] == {"id": created["id"], "name": "f1"}
    assert instances(api) == [(0, "busy")]
    data = run["latest_job_submission"]["job_provisioning_data"]
    assert (data["instance_id"], data["price"]) == ("f1-0", 1.2)

    assert refusal(api, "{p}/fleets/delete", {"names": ["f1"]}) == (
        400, "error", "Failed to delete fleet f1. Fleet is in use.",
    )  # fmt: skip
    assert refusal(api, "{p}/fleets/delete_instances", {"name": "f1", "instance_nums": [0]}) == (
        400, "error", "Failed to delete fleet f1 instances [0]. Fleet instances are in use.",
    )  # fmt: skip

    api.apply("second", "sleep 600", fleets=["main/f1"])
    api.wait("second", "running")
    assert instances(api) == [(0, "busy"), (1, "busy")]
    third = api.run("third", "true", fleets=["f1"])
    assert ending(third)[3] == "failed_to_start_due_to_no_capacity"
    assert third["latest_job_submission"]["termination_reason_message"] == "Failed to use specified fleets"
    assert third["fleet"] is None
    for name in ("first", "second"):
        api.stop(name, abort=True)
        api.wait(name)
    wait_instances(api, (0, "idle"), (1, "idle"))
    assert api.run("fourth", "true", fleets=["f1"])["status"] == "done"
    delete(api)


def test_a_run_waits_for_its_instance_and_leaves_it_idle(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.3)
    apply(api, fleet(nodes="0..1", resources={"gpu": "A100:2.."}))
    api.apply("starts-one", "echo $DSTACK_GPUS_NUM", fleets=["f1"])
    wait_instances(api, (0, "provisioning"))
    run = api.wait("starts-one")
    assert api.output(run).strip() == "2", "what the fleet asks for counts too"
    wait_instances(api, (0, "idle"))
    again = api.run("finds-it", "echo $DSTACK_GPUS_NUM", fleets=["f1"])
    assert again["status"] == "done"
    assert api.output(again).strip() == "2"
    assert instances(api) == [(0, "idle")]
    # 5 GPUs do not fit on it, and the fleet may have one instance only.
    more = api.run("needs-more", "true", fleets=["f1"], resources={"gpu": "A100:5"})
    assert more["latest_job_submission"]["termination_reason_message"] == "Fleet is at capacity"


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"fleets": ["nope"]}, "Failed to use specified fleets"),
        ({"fleets": ["other/f1"]}, "Failed to use specified fleets"),
        (
            {"fleets": ["f1"], "resources": {"gpu": "H100"}},
            "No offers matching the run requirements in fleet 'f1'.\n"
            "See https://dstack.ai/docs/guides/troubleshooting/#provisioning-fails",
        ),
        (
            {"fleets": ["f1"], "spot_policy": "spot"},
            "No offers matching the run requirements in fleet 'f1'.\n"
            "See https://dstack.ai/docs/guides/troubleshooting/#provisioning-fails",
        ),
        ({"fleets": ["f1"], "creation_policy": "reuse"}, "Could not reuse any instance for this job"),
        ({"fleets": ["f1"], "nodes": 2}, "Failed to use specified fleets"),
    ],
)
def test_runs_without_a_machine_fail_with_the_words_of_a_real_server(
    make: Callable[..., Api], configuration: Any, message: str
) -> None:
    api = make(needs_fleet=True)
    apply(api, fleet())
    run = api.run("stuck", "true", **configuration)
    assert ending(run)[:4] == ("failed", "job_failed", "failed", "failed_to_start_due_to_no_capacity")
    assert run["latest_job_submission"]["termination_reason_message"] == message
    assert run["fleet"] is None
    spec = {"configuration": {"type": "task", "commands": ["true"], **configuration}}
    offers = api.ok("{p}/runs/get_plan", {"run_spec": spec})["job_plans"][0]["offers"]
    assert bool(offers) == ("creation_policy" in configuration)


def test_a_fleet_that_only_a_real_server_has_stands_for_the_implicit_one(make: Callable[..., Api]) -> None:
    run = make().run("elsewhere", "true", fleets=["production"])
    assert (run["status"], run["fleet"]["name"]) == ("done", "local")


def test_nodes_run_in_a_cluster(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.01)
    apply(api, fleet(nodes="0..2", placement="cluster"))
    run = api.run("pair", "echo $DSTACK_NODE_RANK", nodes=2, fleets=["f1"])
    assert run["status"] == "done"
    used = {job["job_submissions"][-1]["job_provisioning_data"]["instance_id"] for job in run["jobs"]}
    assert used == {"f1-0", "f1-1"}


def test_without_a_fleet_a_run_runs_unless_the_server_needs_one(make: Callable[..., Api]) -> None:
    api = make()
    run = api.run("anywhere", "true")
    assert (run["status"], run["fleet"]["name"]) == ("done", "local")
    assert api.run("named", "true", fleets=["local"])["status"] == "done"

    strict = make(needs_fleet=True, instance_seconds=0.01)
    run = strict.run("homeless", "true")
    recorded = recording("runs_get_no_fleet_0.22.5")["response"]["json"]["latest_job_submission"]
    latest = run["latest_job_submission"]
    for key in ("status", "status_message", "termination_reason", "termination_reason_message"):
        assert latest[key] == recorded[key]
    spec = {"configuration": {"type": "task", "commands": ["true"]}}
    body = {"run_spec": spec}
    assert strict.ok("{p}/runs/get_plan", body)["job_plans"][0]["offers"] == []
    for_offers = strict.ok("{p}/runs/get_plan", {**body, "for_offers_only": True})
    assert len(for_offers["job_plans"][0]["offers"]) == 1
    apply(strict, fleet("dear", nodes=1))
    apply(strict, fleet("empty"))
    wait_instances(strict, (0, "idle"), name="dear")
    run = strict.run("housed", "true")
    assert (run["status"], run["fleet"]["name"]) == ("done", "dear"), "the one with an idle instance"


def test_a_lost_machine_leaves_the_fleet(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.01)
    api.server.scenarios.lose_machine(run="unlucky", noticed_after=0)
    apply(api, fleet(nodes="0..1"))
    retry = {"on_events": ["error"], "duration": "1h"}
    run = api.run("unlucky", "sleep 0.2; echo done", fleets=["f1"], retry=retry)
    assert run["status"] == "done"
    reasons = [one["termination_reason"] for one in api.ok("instances/list", {})]
    assert sorted(reasons, key=str) == [None, "unreachable"]


def test_regions_and_prices_restrict_runs_and_fleets(make: Callable[..., Api]) -> None:
    api = make(
        instance_seconds=0.01, regions={"aws/us-east-1": 1.2, "gcp/us-west1": 0.9, "aws/eu-west-1": 1.5}
    )
    spec = {"configuration": {"type": "task", "commands": ["true"]}}

    def offered(**configuration: Any) -> list[tuple[str, str, float]]:
        found = copy.deepcopy(spec)
        found["configuration"] |= configuration
        plan = api.ok("{p}/runs/get_plan", {"run_spec": found})["job_plans"][0]
        assert plan["total_offers"] == len(plan["offers"])
        return [(one["backend"], one["region"], one["price"]) for one in plan["offers"]]

    assert offered() == [("gcp", "us-west1", 0.9), ("aws", "us-east-1", 1.2), ("aws", "eu-west-1", 1.5)]
    assert offered(backends=["aws"], max_price=1.3) == [("aws", "us-east-1", 1.2)]
    assert offered(regions=["EU-WEST-1"]) == [("aws", "eu-west-1", 1.5)]
    assert offered(backends=["azure"]) == []
    run = api.run("cheap", "true", backends=["aws"])
    assert run["latest_job_submission"]["job_provisioning_data"]["region"] == "us-east-1"
    gpus = {"run_spec": {"configuration": {**spec["configuration"], "resources": {"gpu": 1}}}}
    grouped = api.ok("{p}/gpus/list", {**gpus, "group_by": ["backend", "region"]})["gpus"]
    assert [(one["backend"], one["region"], one["offer_price"]["min"]) for one in grouped] == offered()
    (whole,) = api.ok("{p}/gpus/list", gpus)["gpus"]
    assert (whole["backends"], whole["offer_price"]) == (["gcp", "aws"], {"min": 0.9, "max": 1.5})
    plan = api.ok("{p}/fleets/get_plan", {"spec": fleet(backends=["aws"])})
    assert [one["price"] for one in plan["offers"]] == [1.2, 1.5]
    apply(api, fleet(nodes=1, regions=["eu-west-1"]))
    (one,) = wait_instances(api, (0, "idle"))
    assert (one["backend"], one["region"], one["price"]) == ("aws", "eu-west-1", 1.5)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (
            {"us-east-1": 1.0},
            r'^regions: expected "BACKEND/REGION" such as "aws/us-east-1", got \'us-east-1\'\.$',
        ),
        ({"aws/x": -1}, r"^regions: expected a price of 0 or more for aws/x, got -1\.$"),
    ],
)
def test_regions_are_checked(regions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalServer(regions=regions)
