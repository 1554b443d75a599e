"""Task and Service: every documented parameter and form."""

from __future__ import annotations

from typing import Any

import pytest

import dstack_core as dstack
from tests.documented.conftest import Bench


@pytest.mark.parametrize("commands", [["echo one", "echo two"], "echo one"])
def test_commands_take_a_list_and_one_text(bench: Bench, commands: Any) -> None:
    wanted = [commands] if isinstance(commands, str) else commands
    assert bench.configuration(dstack.Task(commands=commands))["commands"] == wanted
    assert bench.configuration(dstack.Service(commands=commands, port=8000))["commands"] == wanted


def test_ports_take_numbers_texts_and_mappings(bench: Bench) -> None:
    ports: list[int | str | dstack.PortMapping] = [
        9000,
        "8080:80",
        "*:8001",
        dstack.PortMapping(container_port=7000, local_port=7001),
        dstack.PortMapping(container_port=6006),
    ]
    arrived = bench.configuration(dstack.Task(commands=["true"], ports=ports), verify_ports=False)["ports"]
    assert [(port["local_port"], port["container_port"]) for port in arrived] == [
        (9000, 9000),
        (8080, 80),
        (None, 8001),
        (7001, 7000),
        (None, 6006),
    ]


@pytest.mark.parametrize("env", [{"A": "1", "B": "x=y"}, ["A=1", "B=x=y"]])
def test_env_takes_a_list_and_a_dict(bench: Bench, env: Any) -> None:
    run = bench.client.runs.submit(dstack.Task(commands=['echo "$A $B"'], env=env))
    assert run.wait(timeout=60, poll_interval=0.1).succeeded
    assert b"".join(run.logs()) == b"1 x=y\r\n"
    assert bench.configuration(dstack.Service(commands=["true"], env=env, port=80))["env"] == {
        "A": "1",
        "B": "x=y",
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", 3.13])
def test_python(bench: Bench, python: Any) -> None:
    assert bench.configuration(dstack.Task(commands=["true"], python=python))["python"] == str(python)


def test_image(bench: Bench) -> None:
    assert bench.configuration(dstack.Task(commands=["true"], image="ubuntu"))["image"] == "ubuntu"


def test_python_and_image_exclude_each_other() -> None:
    with pytest.raises(
        dstack.ConfigurationError, match=r"expected either python or image, got .*\. Remove one of them"
    ):
        dstack.Task(commands=["true"], python="3.11", image="ubuntu")


def test_entrypoint(bench: Bench) -> None:
    task = dstack.Task(image="ubuntu", entrypoint="/bin/bash -c", commands=["true"])
    assert bench.configuration(task)["entrypoint"] == "/bin/bash -c"


@pytest.mark.parametrize("port", [8000, "80:8000"])
def test_service_port(bench: Bench, port: int | str) -> None:
    arrived = bench.configuration(dstack.Service(commands=["true"], port=port))["port"]
    assert arrived == {"local_port": 80, "container_port": 8000}


def test_service_port_is_required() -> None:
    service: Any = dstack.Service
    with pytest.raises(dstack.ConfigurationError, match=r"Service\.port: expected a value, got none"):
        service(commands=["true"])


def test_every_documented_parameter_is_optional_but_the_port() -> None:
    optional = {"commands", "env", "python", "image", "entrypoint", "registry_auth"}
    for name in {*optional, "ports"}:
        assert dstack.Task.model_fields[name].default is None, name
    for name in optional:
        assert dstack.Service.model_fields[name].default is None, name
    assert dstack.Service.model_fields["port"].is_required()
