"""Refused requests: versions, content types, unknown keys and wrong values."""

from __future__ import annotations

from typing import Any

import pytest

from tests.local.support import Api, task


def _refusal(api: Api, **configuration: Any) -> tuple[Any, Any]:
    plan = {"run_spec": task(None, "true", **configuration)}
    reply = api.call("{p}/runs/apply", {"plan": plan, "force": False})
    assert reply.status_code == 422, reply.text
    detail = reply.json()["detail"][0]
    assert set(detail) == {"loc", "msg", "type"}
    return detail["loc"], detail["type"]


def test_unknown_keys_are_refused_at_every_level(api: Api) -> None:
    good = {"run_spec": task(None, "true")}
    for path, body in (
        ("{p}/runs/apply", {"plan": good, "force": False, "x": 1}),
        ("{p}/runs/apply", {"plan": {**good, "x": 1}, "force": False}),
        ("{p}/runs/apply", {"plan": {"run_spec": {**good["run_spec"], "x": 1}}, "force": False}),
        ("{p}/runs/get_plan", {**good, "x": 1}),
        ("{p}/runs/get", {"x": 1}),
        ("{p}/runs/stop", {"runs_names": [], "abort": False, "x": 1}),
        ("{p}/runs/delete", {"runs_names": [], "x": 1}),
        ("runs/list", {"x": 1}),
        ("events/list", {"x": 1}),
        ("{p}/repos/get", {"repo_id": "r", "include_creds": True, "x": 1}),
    ):
        reply = api.call(path, body)
        assert reply.status_code == 422, path
        detail = reply.json()["detail"]
        assert detail[0]["loc"][0] == "body"
        assert (detail[0]["loc"][-1], detail[0]["type"]) == ("x", "extra_forbidden")


@pytest.mark.parametrize(
    "configuration",
    [
        {"retry_policy": {}},
        {"build": []},
        {"cache": []},
        {"artifacts": []},
        {"resources": {"gpus": 1}},
        {"resources": {"gpu": {"names": ["A100"]}}},
        {"registry_auth": {"password": "x"}},
        {"python": "3.11", "image": "debian"},
        {"python": "3.7"},
        {"backends": ["nowhere"]},
        {"nodes": 0},
        {"ports": ["x:y"]},
        {"max_duration": "soon"},
        {"max_price": 0},
        {"spot_policy": "sometimes"},
        {"env": ["1=2"]},
        {"env": {"A": []}},
        {"retry": {"on_events": ["bad-luck"]}},
        {"commands": []},
        {"type": "job"},
    ],
)
def test_configurations_are_refused(api: Api, configuration: dict[str, Any]) -> None:
    location, _ = _refusal(api, **configuration)
    assert location[:4] == ["body", "plan", "run_spec", "configuration"]


def test_configuration_is_normalised(api: Api, name: str) -> None:
    run = api.apply(
        name,
        "true",
        env=["A=1", "B=x=y"],
        ports=[8080, "8081:80", "*:90", "10500"],
        fleets=["rig", "other/rig"],
        retry={"duration": "1h"},
        resources={
            "cpu": "x86:4..8",
            "memory": "16GB..",
            "gpu": "A100:40GB..:2",
            "disk": None,
            "shm_size": "1GB",
        },
        idle_duration="5m",
        files=["a.txt", "b.txt:/c/d.txt"],
        max_price=3,
    )
    stored = run["run_spec"]["configuration"]
    assert stored["env"] == {"A": "1", "B": "x=y"}
    assert [tuple(port.values()) for port in stored["ports"]] == [
        (8080, 8080), (8081, 80), (None, 90), (10500, 10500),
    ]  # fmt: skip
    assert stored["fleets"] == [{"project": None, "name": "rig"}, {"project": "other", "name": "rig"}]
    assert stored["retry"] == {"on_events": None, "duration": 3600}
    resources = stored["resources"]
    assert resources["cpu"] == {"arch": "x86", "count": {"min": 4, "max": 8}}
    assert resources["memory"] == {"min": 16.0, "max": None}
    assert resources["gpu"]["name"] == ["A100"]
    assert resources["gpu"]["count"] == {"min": 2, "max": 2}
    assert resources["gpu"]["memory"] == {"min": 40.0, "max": None}
    assert (resources["disk"], resources["shm_size"], stored["idle_duration"]) == (None, 1.0, 300)
    spec = run["jobs"][0]["job_spec"]
    assert [(app["port"], app["map_to_port"]) for app in spec["app_specs"]] == [
        (8080, 8080), (80, 8081), (90, None),
    ]  # fmt: skip
    assert spec["retry"]["duration"] == 3600
    assert spec["requirements"]["max_price"] == 3
    api.wait(name)


def test_env_without_a_value_breaks_as_the_real_server_does(api: Api) -> None:
    plan = {"run_spec": task(None, "true", env=["FOO"])}
    reply = api.call("{p}/runs/apply", {"plan": plan, "force": False})
    assert (reply.status_code, reply.text) == (500, "Internal Server Error")


def test_content_type_and_body_are_demanded(api: Api) -> None:
    url = f"{api.server.url}/api/runs/list"
    for data, headers in (
        ("{}", {}),
        ("{}", {"Content-Type": "text/plain"}),
        ("", {"Content-Type": "application/json"}),
        ("{", {"Content-Type": "application/json"}),
        ("[]", {"Content-Type": "application/json"}),
    ):
        reply = api.session.post(url, data=data, headers=headers, timeout=10)
        assert reply.status_code == 422, (data, headers)
        assert reply.json()["detail"][0]["loc"][0] == "body"
    good = {"Content-Type": "application/json; charset=utf-8"}
    assert api.session.post(url, data="{}", headers=good, timeout=10).status_code == 200


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("latest", None),
        ("0.22.5", None),
        ("0.22.99", None),
        ("0.18.44", None),
        ("0.23.0", "The client/CLI version (0.23.0) is incompatible with the server version (0.22.5)."),
        ("1.0.0", "The client/CLI version (1.0.0) is incompatible with the server version (0.22.5)."),
        ("garbage", "Invalid version: garbage"),
    ],
)
def test_client_version_is_checked(api: Api, version: str, message: str | None) -> None:
    url = f"{api.server.url}/api/runs/list"
    reply = api.session.post(url, json={}, headers={"X-API-VERSION": version}, timeout=10)
    expected = 200 if message is None else 400
    assert reply.status_code == expected
    if message is not None:
        assert reply.json() == {"detail": [{"msg": message, "code": "error"}]}


def test_unknown_paths(api: Api) -> None:
    post, get = api.session.post, api.session.get
    for path in ("/api/project/main/runs/submit", "/api/project/main/runs/list", "/nowhere"):
        reply = post(api.server.url + path, json={}, timeout=10)
        assert (reply.status_code, reply.json()) == (405, {"detail": "Method Not Allowed"})
    reply = get(f"{api.server.url}/nowhere", timeout=10)
    assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})
    assert get(f"{api.server.url}/healthcheck", timeout=10).json() == {"status": "running"}
    assert get(f"{api.server.url}/api/project/main/metrics/job/never-was", timeout=10).status_code == 400


def test_endpoints_without_a_body_take_any(api: Api) -> None:
    for path in (
        "server/get_info",
        "users/get_my_user",
        "projects/list",
        "projects/main/get",
        "{p}/fleets/list",
    ):
        assert api.call(path).status_code == api.call(path, {}).status_code == 200
    assert api.ok("{p}/fleets/list") == api.ok("{p}/fleets/list", {})
    assert api.call("projects/other/get").status_code == 404


def test_ssh_keys_are_a_pair_in_the_formats_of_the_real_server(api: Api) -> None:
    from cryptography.hazmat.primitives import serialization

    user = api.ok("users/get_my_user")
    assert user["creds"]["token"] == api.server.token
    assert user["ssh_private_key"].startswith("-----BEGIN PRIVATE KEY-----")
    key = serialization.load_pem_private_key(user["ssh_private_key"].encode(), None)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert user["ssh_public_key"] == f"{public.decode()} admin\n"
    assert api.ok("users/get_my_user") == user


def test_what_the_embedded_server_cannot_do_is_refused(api: Api) -> None:
    spec = task(None, "true", schedule={"cron": "* * * * *"})
    reply = api.call("{p}/runs/apply", {"plan": {"run_spec": spec}, "force": False})
    assert reply.status_code == 400
    assert "does not support" in reply.json()["detail"][0]["msg"]
