"""Bad input gets one clear error that names the field, the value and what to do, before anything is sent."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

import dstack_core
from dstack_core import ConfigurationError
from dstack_core._wire.spec import check_run_name, run_spec
from dstack_core.models.options import SubmitOptions

# Untyped on purpose: these tests pass values that a type checker would refuse.
dstack: Any = dstack_core


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: dstack.Task(python="3.11", image="ubuntu"), r"Task\.image: expected either python or image, got python='3.11' and image='ubuntu'\. Remove"),
        (lambda: dstack.Task(env=["A=1", "B = 1"]), r"Task\.env: expected NAME=value or NAME as item 2"),
        (lambda: dstack.Task(env={"DEBUG": True}), r"Task\.env: expected a string for DEBUG, got a bool\. Write it as"),
        (lambda: dstack.Task(ports=["80:b"]), r"Task\.ports: expected a port mapping .*, got '80:b'"),
        (lambda: dstack.Task(ports=[70000]), r"Task\.ports: expected a port from 1 to 65535, got 70000"),
        *(
            (lambda port=port: dstack.Task(ports=[port]), rf"Task\.ports: expected a port from 1 to 65535, got {port!r}\.".replace("*", r"\*"))
            for port in ("70000:80", "80:70000", "99999", "*:70000", "0:80", "80:0")
        ),
        (lambda: dstack.Service(port="80:65536"), r"Service\.port: expected a port from 1 to 65535, got '80:65536'\."),
        (lambda: dstack.Task(ports=[{"local_port": 65536, "container_port": 80}]), r"Task\.ports, item 1, local_port: expected .* 65535, got 65536"),
        (lambda: dstack.load_configuration({"type": "task", "ports": ["70000:80"]}), r"ports: expected a port from 1 to 65535, got '70000:80'\."),
        (lambda: dstack.Service(commands=["x"]), r"Service\.port: expected a value, got none\."),
        (lambda: dstack.GPU(memory="24XB"), r"GPU\.memory: expected a size such as \"24GB\".*, got '24XB'"),
        (lambda: dstack.GPU(count="many"), r"GPU\.count: expected a whole number such as 2.*, got 'many'"),
        (lambda: dstack.GPU(count=-1), r"GPU\.count: expected a whole number such as 2.*, got -1"),
        (lambda: dstack.GPU(vram="24GB"), r"GPU\.vram: there is no such field; expected one of name, count, memory, vendor\.$"),
        (lambda: dstack.GPU(vendro="amd"), r"GPU\.vendro: there is no such field; did you mean vendor\?$"),
        (lambda: dstack.Resources(memory=".."), r"Resources\.memory: expected a size such as .*, got '\.\.'"),
        (lambda: dstack.RetryPolicy(retry=True, limit=0), r"RetryPolicy\.limit: expected seconds above 0.*, got 0"),
        (lambda: dstack.RetryPolicy(on_events=["spot"]), r"RetryPolicy\.on_events: expected a list of \"no-capacity\", \"interruption\", \"error\", got \['spot'\]"),
        (lambda: dstack.RetryPolicy(on_events=[]), r"RetryPolicy\.on_events: expected a list of .*, got \[\]"),
        (lambda: dstack.RetryPolicy(on_events=cast(Any, "error")), r"RetryPolicy\.on_events: expected a list of .*, got 'error'"),
        (lambda: dstack.RegistryAuth(username="me"), r"RegistryAuth\.password: expected a value, got none\."),
        (lambda: dstack.load_configuration({"type": "fleet"}), r"expected one of `type: task`, `type: service`, `type: dev-environment`, got 'fleet'"),
        (lambda: dstack.parse_configuration("- a\n- b"), r"expected a mapping such as .type: task., got a list"),
        (lambda: dstack.parse_configuration("a: [", "x.yml"), r"x\.yml, line \d"),
        (lambda: dstack.load_configuration("/nowhere/x.dstack.yml"), r"/nowhere/x\.dstack\.yml: No such file"),
        (lambda: dstack.load_configuration(3), r"configuration: expected a Task, a Service, a dict or the path of a .dstack.yml, got 3\."),
        (lambda: check_run_name("Train_1"), r"run_name: expected 2 to 41 lower-case letters.*, got 'Train_1'"),
        (lambda: check_run_name("a"), r"run_name: expected .*, got 'a'"),
        (lambda: check_run_name("a" * 42), r"run_name: expected .*, got 'a{42}'"),
    ],
)  # fmt: skip
def test_models_refuse_wrong_values(build: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        build()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_price": -1}, r"max_price: expected USD per hour above 0, got -1\."),
        ({"max_price": 0}, r"max_price: expected USD per hour above 0, got 0"),
        ({"max_duration": 0}, r"max_duration: expected seconds above 0.*, got 0"),
        ({"retry_policy": "1h"}, r"retry_policy: expected a RetryPolicy, True or False, .*, got '1h'\."),
        ({"retry_policy": {"on": True}}, r"retry_policy: expected a RetryPolicy, .*, got \{'on': True\}\."),
        ({"retry_policy": {"retry": True, "on_events": ["spot"]}}, r"^retry_policy\.on_events: expected a list of .*, got \['spot'\]"),
        ({"backends": "aws"}, r"backends: expected a list such as \[\"aws\", \"gcp\"\], got 'aws'\."),
        ({"backends": [1]}, r"backends: expected a list such as .*, got \[1\]\."),
        ({"backends": ["aws", ""]}, r"backends: expected a list such as .*, got \['aws', ''\]\."),
        ({"spot_policy": "cheap"}, r"spot_policy: expected one of 'spot'.*, got 'cheap'"),
    ],
)  # fmt: skip
def test_options_refuse_wrong_values(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        run_spec(dstack.Task(commands=["x"]), cast(SubmitOptions, options))


@pytest.mark.parametrize(
    ("policy", "sent"),
    [
        (True, True),
        (False, False),
        ({"on_events": ["error"], "duration": "2h"}, {"on_events": ["error"], "duration": "2h"}),
        ({"retry": True, "limit": "2h"}, {"on_events": ["no-capacity"], "duration": "2h"}),
        (dstack.RetryPolicy(retry=True, limit="2h"), {"on_events": ["no-capacity"], "duration": "2h"}),
        (
            {"retry": True, "limit": "2h", "on_events": ["interruption"]},
            {"on_events": ["interruption"], "duration": "2h"},
        ),
        (
            dstack.RetryPolicy(on_events=["no-capacity", "interruption"]),
            {"on_events": ["no-capacity", "interruption"], "duration": 3600},
        ),
        (dstack.RetryPolicy(retry=False, on_events=["error"]), {"on_events": ["interruption"]}),
        (dstack.RetryPolicy(), {"on_events": ["interruption"]}),
        (None, {"on_events": ["interruption"]}),
    ],
)
def test_a_retry_policy_may_be_written_as_in_yaml(policy: Any, sent: Any) -> None:
    task = dstack.Task(commands=["x"], retry={"on_events": ["interruption"]})
    assert run_spec(task, SubmitOptions(retry_policy=policy))["configuration"]["retry"] == sent


@pytest.mark.parametrize("call", ["submit", "plan", "apply"])
def test_a_wrong_retry_policy_is_refused_before_any_request(call: str) -> None:
    target = {"server_url": "http://127.0.0.1:9", "project_name": "main", "user_token": "t"}
    task = dstack.Task(commands=["x"])
    with (
        dstack.Client(**target) as client,
        pytest.raises(ConfigurationError, match=r"^retry_policy: expected"),
    ):
        getattr(client.runs, call)(task, retry_policy="always")

    async def ask() -> None:
        async with dstack.AsyncClient(**target) as client:
            await getattr(client.runs, call)(task, retry_policy="always")

    with pytest.raises(ConfigurationError, match=r"^retry_policy: expected"):
        asyncio.run(ask())


def test_a_value_pasted_into_env_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        dstack.Task(env=["s3cr3t-of-mine"])
    assert "s3cr3t" not in str(caught.value)


def test_secrets_are_in_no_repr() -> None:
    task = dstack.Task(
        commands=["x"],
        env={"TOKEN": "s3cr3t"},
        registry_auth=dstack.RegistryAuth(username="me", password="s3cr3t"),
    )
    client = dstack.Client(server_url="http://server", project_name="main", user_token="s3cr3t")
    for thing in (task, client, client.runs, client._transport, client._operations):
        assert "s3cr3t" not in repr(thing)
    assert "TOKEN" in repr(task)


def test_spec_holds_only_what_was_set_in_the_forms_every_server_takes() -> None:
    task = dstack.Task(commands=["train"], env=["A=1"], ports=[8000, "80:8080"], nodes=2, disk=None)
    options = SubmitOptions(
        resources=dstack.Resources(
            gpu=dstack.GPU(name="A100", memory="40GB", count=2), memory=16384, shm_size="8GB"
        ),
        spot_policy=dstack.SpotPolicy.AUTO,
        retry_policy=dstack.RetryPolicy(retry=True),
        max_duration="2h",
        max_price=1.5,
        backends=["aws"],
        working_dir="src",
    )
    spec = run_spec(task, options, run_name="train", marker="mine")
    assert spec["configuration"] == {
        "type": "task",
        "commands": ["train"],
        "env": {"A": "1"},
        "ports": [8000, "80:8080"],
        "nodes": 2,
        "disk": None,
        "resources": {
            "gpu": {"name": ["A100"], "memory": "40GB..", "count": "2.."},
            "memory": "16384MB..",
            "shm_size": "8GB",
            "disk": None,
        },
        "spot_policy": "auto",
        "retry": {"on_events": ["no-capacity"], "duration": 3600},
        "max_duration": "2h",
        "max_price": 1.5,
        "backends": ["aws"],
        "working_dir": "/workflow/src",
    }
    assert (spec["run_name"], spec["configuration_path"], spec["working_dir"]) == ("train", "mine", "src")


def test_a_file_a_dict_and_a_task_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "train.dstack.yml"
    path.write_text("type: task\nname: train\ncommands:\n  - python train.py\nenv:\n  - A=1\nnodes: 2\n")
    from_file = dstack.load_configuration(path)
    from_dict = dstack.load_configuration(
        {"type": "task", "name": "train", "commands": ["python train.py"], "env": {"A": 1}, "nodes": 2}
    )
    assert (
        from_file
        == from_dict
        == dstack.Task(name="train", commands=["python train.py"], env=["A=1"], nodes=2)
    )
    assert run_spec(from_file, SubmitOptions()) == run_spec(from_dict, SubmitOptions())


def test_statuses_are_text() -> None:
    assert "Run: " + dstack.RunStatus.RUNNING == "Run: running"
    assert f"{dstack.RunStatus.DONE}" == "done"
    documented = (
        "PENDING SUBMITTED DOWNLOADING BUILDING RUNNING UPLOADING STOPPING STOPPED RESTARTING "
        "TERMINATING TERMINATED ABORTING ABORTED FAILED DONE"
    )
    assert {member.name for member in dstack.RunStatus} == {*documented.split(), "PROVISIONING"}
    assert dstack.SpotPolicy.ON_DEMAN is dstack.SpotPolicy.ON_DEMAND


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"registry_auth": "u:s3cr3t"}, "Task.registry_auth: expected a mapping of username and password, got a string."),
        ({"registry_auth": {"username": "u", "password": ["s3cr3t"]}}, "Task.registry_auth.password: expected a string, got a list."),
        ({"files": [5]}, 'Task.files, item 1: expected a path, "local_path:path", or a mapping of local_path and path, got 5.'),
        ({"files": ["a", {"local_path": "b", "Path": "c"}]}, "Task.files, item 2, Path: there is no such field; check its spelling."),
        ({"repos": [5]}, "Task.repos, item 1: expected a path, an address, or a mapping of local_path or url, got 5."),
        ({"files": "data"}, "Task.files: expected a list, got 'data'."),
        ({"repos": "."}, "Task.repos: expected a list, got '.'."),
        ({"repos": "https://s3cr3t@host/a"}, "Task.repos: expected a list, got 'https://***@host/a'."),
        ({"backends": "aws"}, "Task.backends: expected a list, got 'aws'."),
        ({"regions": "eu"}, "Task.regions: expected a list, got 'eu'."),
        ({"availability_zones": "a"}, "Task.availability_zones: expected a list, got 'a'."),
        ({"env": "S=s3cr3t"}, "Task.env: expected a mapping or a list, got a string."),
        ({"nodes": "x"}, "Task.nodes: expected a whole number, got 'x'."),
        ({"privileged": "maybe"}, "Task.privileged: expected true or false, got 'maybe'."),
        ({"commands": [True]}, "Task.commands, item 1: expected a string, got True."),
        ({"ports": [[1]]}, "Task.ports, item 1: expected a whole number, a string or a mapping, got [1]."),
        ({"ports": [True]}, "Task.ports, item 1: expected a whole number, a string or a mapping, got True."),
        ({"ports": [{"container_port": "x"}]}, "Task.ports, item 1, container_port: expected a whole number, got 'x'."),
        ({"nodes": "x", "user": [1]}, "Task.user: expected a string, got [1]. Task.nodes: expected a whole number, got 'x'."),
        ({"type": "service", "port": 80, "probes": ["s3cr3t"]}, "Service.probes, item 1: expected a mapping, got a string."),
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_shape_is_one_sentence(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        dstack.load_configuration({"type": "task", "commands": ["x"], **given})
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "configuration: expected a Task, a Service, a dict or the path of a .dstack.yml, got ''."),
        (
            "type: task\ncommands: [x]\n",
            "configuration: expected the path of a .dstack.yml or a dict, got YAML text. "
            "Pass dstack_core.parse_configuration(text).",
        ),
        ("/", "configuration: expected a file, got the directory /."),
    ],
)
def test_a_text_that_does_not_name_a_file_is_explained(source: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        dstack.load_configuration(source)
    assert str(caught.value) == text


def test_a_file_has_one_document() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^configuration, line 2: expected one document, got another"
    ):
        dstack.parse_configuration("type: task\n---\ntype: task")
