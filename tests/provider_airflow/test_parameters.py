"""Every documented parameter of a submit is one of the operator: taken, rendered, and checked first."""

from __future__ import annotations

import inspect
import socket
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._from_operator import submit_arguments
from airflow_provider_dstack._parameters import RENAMED
from airflow_provider_dstack.errors import DstackError
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Client, RunCollection, SubmitOptions
from dstack_core.local import LocalServer
from tests.ports import free_port
from tests.provider_airflow.support import paths
from tests.provider_airflow.test_filling import spec_of
from tests.provider_airflow.test_operator import CONTEXT, RUN

# What the operator chooses itself: who a run belongs to.
OWN = {"marker", "sleep", "on_event"}
# These are booleans and numbers; a template would make them texts.
NOT_TEMPLATED = {"verify_ports", "retry_budget", "local_repo", "reports"}
TRUE: dict[str, Any] = {"type": "task", "commands": ["true"]}


def documented() -> list[str]:
    parameters = inspect.signature(RunCollection.submit).parameters
    return sorted({*parameters, *SubmitOptions.__optional_keys__} - OWN - {"self", "options"})


def operator(**arguments: Any) -> DstackRunOperator:
    return DstackRunOperator(**{"task_id": "train", "configuration": TRUE, "poll_interval": 0.1, **arguments})


@pytest.mark.parametrize("name", documented())
def test_every_parameter_of_submit_is_one_of_the_operator(name: str) -> None:
    taken = inspect.signature(DstackRunOperator.__init__).parameters
    assert RENAMED.get(name, name) in taken
    if name not in NOT_TEMPLATED:
        assert RENAMED.get(name, name) in DstackRunOperator.template_fields


@pytest.mark.parametrize("name", ["repo_dir", "local_repo"])
def test_the_code_of_from_config_is_a_parameter_too(name: str) -> None:
    assert name in inspect.signature(Client.from_config).parameters
    assert name in inspect.signature(DstackRunOperator.__init__).parameters
    assert name in NOT_TEMPLATED or name in DstackRunOperator.template_fields


def test_what_is_given_is_what_is_submitted() -> None:
    given: dict[str, Any] = {
        "run_resources": {"gpu": {"name": "A100", "count": 2}, "memory": "64GB"},
        "spot_policy": "auto",
        "run_retry_policy": {"retry": True, "limit": "1h"},
        "max_duration": "7200",
        "max_price": "2.5",
        "working_dir": "code",
        "backends": "aws",
    }
    told = submit_arguments(operator(**given), CONTEXT)
    assert set(told) <= set(documented())
    assert told["resources"] == given["run_resources"]
    assert told["retry_policy"] == given["run_retry_policy"]
    assert (told["spot_policy"], told["max_duration"], told["max_price"]) == ("auto", 7200, 2.5)
    assert (told["working_dir"], told["backends"]) == ("code", ["aws"])


def test_templates_are_rendered_however_deep_they_are() -> None:
    with DAG("deep", schedule=None):
        task = operator(
            configuration={
                "type": "task",
                "commands": ["run {{ word }}", ["never", "{{ word }}"][0]],
                "env": {"A": "{{ word }}", "PATH_TO": "{{ word }}.yml"},
                "files": [{"local_path": "/{{ word }}", "path": "/data/{{ word }}"}],
                "tags": {"team": "{{ word }}"},
            },
            run_resources={"gpu": {"name": ["{{ word }}", "H100"], "count": {"min": "{{ 1 + 1 }}"}}},
            run_retry_policy={"retry": True, "limit": "{{ 2 }}h"},
            backends=["{{ word }}", "gcp"],
            max_duration="{{ 3600 }}",
        )
    context: Any = {"word": "hi"}
    task.render_template_fields(context)
    assert task.configuration["env"] == {"A": "hi", "PATH_TO": "hi.yml"}
    assert task.configuration["files"] == [{"local_path": "/hi", "path": "/data/hi"}]
    assert task.configuration["tags"] == {"team": "hi"}
    assert task.run_resources == {"gpu": {"name": ["hi", "H100"], "count": {"min": "2"}}}
    assert (task.backends, task.max_duration) == (["hi", "gcp"], "3600")
    assert task.run_retry_policy == {"retry": True, "limit": "2h"}


@pytest.mark.parametrize(
    ("given", "rendered"),
    [
        ("${{ secrets.hf_token }}", "${{ secrets.hf_token }}"),
        ("{{ word }}:${{env.NAME}}", "hi:${{env.NAME}}"),
        ("{% raw %}${{ secrets.one }}{% endraw %}", "${{ secrets.one }}"),
        ("${{ word }}", "$hi"),
        ("${HOME}/{{ word }}", "${HOME}/hi"),
    ],
)
def test_what_the_server_fills_in_is_left_to_it(given: str, rendered: str) -> None:
    with DAG("references", schedule=None):
        task = operator(configuration={**TRUE, "env": {"TOKEN": given}})
        text = operator(task_id="text", configuration=f"type: task\ncommands: ['x']\nname: {given!r}\n")
    context: Any = {"word": "hi"}
    task.render_template_fields(context)
    text.render_template_fields(context)
    assert task.configuration["env"] == {"TOKEN": rendered}
    assert text.configuration.endswith(f"name: {rendered!r}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"configuration": None},
            "configuration: expected a Task, a Service, a dict or the path of a .dstack.yml, got None",
        ),
        ({"configuration": 7}, "configuration"),
        ({"configuration": {**TRUE, "env": ["no name"]}}, "env"),
        ({"configuration": {"type": "task", "commands": [{"a": 1}]}}, "commands"),
        ({"configuration": {**TRUE, "image": "a", "python": "3.11"}}, "image"),
        ({"run_name": "x" * 100}, "got 'xxx"),
        ({"run_resources": {"memory": "much"}}, "much"),
        ({"run_resources": "A100:x"}, "run_resources: expected"),
        ({"run_resources": [1]}, "run_resources: expected"),
        ({"spot_policy": "sometimes"}, "got 'sometimes'"),
        ({"run_retry_policy": {"retry": "perhaps"}}, "run_retry_policy.retry: "),
        (
            {"run_retry_policy": {"retry": True, "limit": "long"}},
            'run_retry_policy.limit: expected seconds above 0, or a string such as "2h" or "3d", got \'long\'',
        ),
        ({"run_retry_policy": 3}, "run_retry_policy: expected a RetryPolicy, True or False, a dict"),
        ({"run_retry_policy": {"attempts": 3}}, "run_retry_policy: expected a RetryPolicy, True or False"),
        (
            {"max_duration": "forever"},
            'max_duration: expected seconds above 0, or a string such as "2h" or "off", got \'forever\'',
        ),
        (
            {"max_duration": "-5"},
            'max_duration: expected seconds above 0, or a string such as "2h" or "off", got \'-5\'',
        ),
        ({"max_price": "-1"}, "max_price: expected USD per hour above 0, got -1"),
        ({"max_price": "0"}, "max_price: expected USD per hour above 0, got 0"),
        ({"backends": ["moon"]}, "backends"),
        ({"backends": 5}, 'backends: expected a list such as ["aws", "gcp"], got 5'),
        ({"repo_dir": "/etc/hostname"}, "repo_dir: expected a directory, got '/etc/hostname'"),
        ({"profiles_file": "/nope.yml"}, "profiles_file: expected a file at /nope.yml, got none"),
        ({"project_name": "no/project"}, "expected a project's name, got 'no/project'"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_value_gets_one_clear_error_and_nothing_is_submitted(
    server: LocalServer, arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(AirflowFailException) as caught:
        operator(**arguments).execute(CONTEXT)
    assert told in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert server.client().runs.list(all=True) == []


@pytest.mark.parametrize(
    ("retry", "wanted"),
    [
        (True, True),
        ({"on_events": ["no-capacity"], "duration": "1h"}, {"on_events": ["no-capacity"], "duration": 3600}),
        ({"retry": True, "limit": "2h"}, {"on_events": ["no-capacity"], "duration": 7200}),
    ],
)
def test_retry_is_taken_as_in_yaml_and_as_a_policy(server: LocalServer, retry: Any, wanted: Any) -> None:
    operator(run_retry_policy=retry).execute(CONTEXT)
    by_option = spec_of(server, RUN.name)["configuration"]["retry"]
    server.client().runs.submit(configuration={**TRUE, "retry": wanted}, run_name="in-the-file")
    assert by_option == spec_of(server, "in-the-file")["configuration"]["retry"]


def test_ports_are_verified_where_that_is_wanted(server: LocalServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        what = {**TRUE, "ports": [held.getsockname()[1]]}
        with pytest.raises((AirflowFailException, DstackError), match=str(held.getsockname()[1])):
            operator(configuration=what, verify_ports=True).execute(CONTEXT)
    assert paths(server, "/runs/apply") == []
    free = operator(configuration={**TRUE, "ports": [free_port()]}, verify_ports=True)
    assert free.execute(CONTEXT)["run_name"] == RUN.name
