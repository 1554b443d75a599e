"""Every documented field and current YAML key is typed (mypy checks this file) and sent as intended."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from dstack_core import (
    GPU,
    Configuration,
    ConfigurationError,
    FileMapping,
    PortMapping,
    RegistryAuth,
    Resources,
    RetryPolicy,
    Service,
    SpotPolicy,
    Task,
    load_configuration,
)
from dstack_core._wire.spec import run_spec
from dstack_core.models.options import SubmitOptions


def sent(configuration: Configuration) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wire: dict[str, Any] = run_spec(configuration, SubmitOptions())["configuration"]
    return wire


TASK = Task(  # noqa: S604 - a field called shell, no subprocess
    commands=["x"],
    ports=[8000, "8080:80", "*:80", PortMapping(container_port=80, local_port=8081)],
    env={"TOKEN": "${{ secrets.hf_token }}"},
    python="3.12",
    entrypoint="/bin/sh -c",
    registry_auth=RegistryAuth(username="me", password="${{ secrets.registry }}"),
    name="train",
    user="root",
    privileged=True,
    docker=False,
    shell="bash",
    working_dir="/src",
    volumes=["v:/data", {"instance_path": "/mnt", "path": "/mnt", "optional": True}],
    files=[
        "a.txt",
        "conf:/etc/conf",
        {"local_path": "b", "path": "/b"},
        FileMapping(local_path="c", path="c"),
    ],
    repos=["https://example.com/o/r.git"],
    resources=Resources(gpu=GPU(memory="24GB")),
    fleets=["a", {"project": "other", "name": "b"}],
    backends=["aws"],
    regions=["eu-west-1"],
    availability_zones=["eu-west-1a"],
    instance_types=["g6e.24xlarge"],
    reservation="cr-1",
    spot_policy=SpotPolicy.AUTO,
    creation_policy="reuse",
    max_price=1.5,
    max_duration="2h",
    stop_duration=60,
    idle_duration=False,
    retry={"on_events": ["no-capacity"], "duration": "1h"},
    utilization_policy={"min_gpu_utilization": 10, "time_window": "1h"},
    schedule={"cron": "0 8 * * *"},
    priority=50,
    tags={"team": "ml"},
    single_branch=True,
    nodes=2,
    startup_order="master-first",
    stop_criteria="master-done",
)


def test_a_task_with_every_field() -> None:
    assert sent(TASK) == {
        "type": "task",
        "commands": ["x"],
        "ports": [8000, "8080:80", "*:80", {"container_port": 80, "local_port": 8081}],
        "env": {"TOKEN": "${{ secrets.hf_token }}"},
        "python": "3.12",
        "entrypoint": "/bin/sh -c",
        "registry_auth": {"username": "me", "password": "${{ secrets.registry }}"},
        "user": "root",
        "privileged": True,
        "docker": False,
        "shell": "bash",
        "working_dir": "/src",
        "volumes": ["v:/data", {"instance_path": "/mnt", "path": "/mnt", "optional": True}],
        "files": [
            {"local_path": "a.txt", "path": "a.txt"},
            {"local_path": "conf", "path": "/etc/conf"},
            {"local_path": "b", "path": "/b"},
            {"local_path": "c", "path": "c"},
        ],
        "resources": {"gpu": {"count": "1..", "memory": "24GB.."}, "disk": None},
        "fleets": ["a", {"project": "other", "name": "b"}],
        "backends": ["aws"],
        "regions": ["eu-west-1"],
        "availability_zones": ["eu-west-1a"],
        "instance_types": ["g6e.24xlarge"],
        "reservation": "cr-1",
        "spot_policy": "auto",
        "creation_policy": "reuse",
        "max_price": 1.5,
        "max_duration": "2h",
        "stop_duration": 60,
        "idle_duration": False,
        "retry": {"on_events": ["no-capacity"], "duration": "1h"},
        "utilization_policy": {"min_gpu_utilization": 10, "time_window": "1h"},
        "schedule": {"cron": "0 8 * * *"},
        "priority": 50,
        "tags": {"team": "ml"},
        "single_branch": True,
        "nodes": 2,
        "startup_order": "master-first",
        "stop_criteria": "master-done",
    }


def test_a_service_with_every_field() -> None:
    service = Service(
        commands=["serve"],
        port="80:8000",
        env=["A=1"],
        image="vllm/vllm-openai",
        auth=False,
        model="llama",
        https="auto",
        gateway=False,
        strip_prefix=False,
        replicas="0..4",
        scaling={"metric": "rps", "target": 10},
        probes=[{"type": "http", "url": "/health"}],
        rate_limits=[{"prefix": "/", "rps": 5}],
    )
    assert sent(service) == {
        "type": "service",
        "commands": ["serve"],
        "port": "80:8000",
        "env": {"A": "1"},
        "image": "vllm/vllm-openai",
        "auth": False,
        "model": "llama",
        "https": "auto",
        "gateway": False,
        "strip_prefix": False,
        "replicas": "0..4",
        "scaling": {"metric": "rps", "target": 10},
        "probes": [{"type": "http", "url": "/health"}],
        "rate_limits": [{"prefix": "/", "rps": 5}],
    }


def test_fields_that_are_unset_or_none_are_not_sent() -> None:
    assert sent(Task(commands=["x"], fleets=None, nodes=None)) == {"type": "task", "commands": ["x"]}


def test_yaml_keeps_its_own_meaning_and_unknown_keys_pass() -> None:
    configuration = load_configuration(
        {
            "type": "task",
            "commands": "x",
            "user": 1000,
            "python": 3.12,
            "idle_duration": -1,
            "max_duration": False,
            "resources": {"memory": "16GB", "gpu": "A100:2"},
            "invented_tomorrow": {"a": [1]},
        }
    )
    assert sent(configuration) == {
        "type": "task",
        "commands": ["x"],
        "user": "1000",
        "python": "3.12",
        "idle_duration": -1,
        "max_duration": False,
        "resources": {"memory": "16GB", "gpu": "A100:2"},
        "invented_tomorrow": {"a": [1]},
    }


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"nodes": 0}, r"Task\.nodes: expected 1 or more, got 0"),
        ({"priority": 101}, r"Task\.priority: expected a number from 0 to 100, got 101"),
        ({"max_price": 0}, r"Task\.max_price: expected USD per hour above 0, got 0"),
        ({"max_price": True}, r"Task\.max_price: expected USD per hour above 0, got True"),
        (
            {"max_duration": "2 hours"},
            r"Task\.max_duration: expected seconds, or a string such as .*, got '2 hours'",
        ),
        ({"max_duration": -1}, r"Task\.max_duration: expected seconds, or .*, got -1"),
        ({"stop_duration": "-1"}, r"Task\.stop_duration: expected seconds, or .*, got '-1'"),
        ({"idle_duration": [1]}, r"Task\.idle_duration: expected seconds, or .*, got \[1\]"),
        ({"fleets": "a"}, r"Task\.fleets: expected a list, got"),
        ({"tags": {"a": 1}}, r"Task\.tags: expected a string for a, got 1; put it in quotes"),
        (
            {"ports": [{"container_port": 0}]},
            r"Task\.ports, item 1, container_port: expected greater than or equal to 1, got",
        ),
    ],
)
def test_values_that_no_server_accepts_are_refused_by_the_client(data: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        load_configuration({"type": "task", "commands": ["x"], **data})


def test_a_header_of_a_probe_is_in_no_repr() -> None:
    probe = {"type": "http", "headers": [{"name": "Authorization", "value": "s3cr3t"}]}
    assert "s3cr3t" not in repr(Service(commands=["x"], port=80, probes=[probe]))
    assert "s3cr3t" not in repr(Task(commands=["x"], env={"TOKEN": "s3cr3t"}))


@pytest.mark.parametrize("limit", [600, "3d", "12h", "90"])
@pytest.mark.parametrize("max_duration", [7200, "2h", "off"])
def test_the_documented_forms_of_policies_and_limits(limit: int | str, max_duration: int | str) -> None:
    options = SubmitOptions(
        spot_policy=SpotPolicy.ON_DEMAN,
        retry_policy=RetryPolicy(retry=True, limit=limit),
        max_duration=max_duration,
        max_price=2,
        backends=["aws", "gcp"],
    )
    assert run_spec(Task(commands=["x"]), options)["configuration"] == {
        "type": "task",
        "commands": ["x"],
        "spot_policy": "on-demand",
        "retry": {"on_events": ["no-capacity"], "duration": limit},
        "max_duration": max_duration,
        "max_price": 2.0,
        "backends": ["aws", "gcp"],
    }


def test_a_policy_that_is_off_sends_nothing() -> None:
    options = SubmitOptions(retry_policy=RetryPolicy(limit="3d"))
    assert "retry" not in run_spec(Task(commands=["x"]), options)["configuration"]


@pytest.mark.parametrize("limit", ["soon", "", "3 days", -5])
def test_a_limit_must_be_a_duration(limit: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"RetryPolicy\.limit: expected seconds above 0"):
        RetryPolicy(retry=True, limit=limit)
    with pytest.raises(ConfigurationError, match=r"max_duration: expected seconds above 0"):
        run_spec(Task(commands=["x"]), SubmitOptions(max_duration=limit))
