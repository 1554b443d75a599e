"""What a configuration leaves open is filled in at submission, or refused before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core import Configuration, ConfigurationError, RegistryAuth, Service, Task, load_configuration
from dstack_core._wire.filling import fill_in, takes_args
from dstack_core._wire.interpolation import ADDRESS, SECRET, Interpolator

TASK = {"type": "task", "commands": ["x"]}


def filled(data: dict[str, Any], **given: Any) -> Configuration:
    arguments = {"env": None, "args": None, "environ": {}, **given}
    return fill_in(load_configuration({**TASK, **data}), **arguments)


def test_names_without_a_value_are_filled_in() -> None:
    wanted = filled(
        {"env": ["A", "B=1", "C", "D="]}, env={"C": "given", "B": "2"}, environ={"A": "here", "C": "no"}
    )
    assert wanted.env == {"A": "here", "B": "2", "C": "given", "D": ""}


def test_a_value_may_have_several_lines() -> None:
    # A key, for example. dstack's own client accepts it in a mapping only.
    assert filled({"env": ["KEY=-----BEGIN\nabc\n"]}).env == {"KEY": "-----BEGIN\nabc\n"}


def test_an_empty_variable_of_the_process_is_a_value() -> None:
    assert filled({"env": ["A"]}, environ={"A": ""}).env == {"A": ""}


def test_a_mapping_may_name_variables_without_a_value() -> None:
    assert filled({"env": {"A": None, "B": 1}}, environ={"A": "a"}).env == {"A": "a", "B": "1"}
    # dstack's own models write it this way.
    assert filled({"env": {"A": {"key": "A"}}}, environ={"A": "a"}).env == {"A": "a"}


def test_env_is_added_to_a_configuration_without_env() -> None:
    assert filled({}, env={"A": "1", "STEPS": 5}).env == {"A": "1", "STEPS": "5"}
    assert filled({}).env is None


def test_one_error_names_everything_that_is_missing() -> None:
    with pytest.raises(ConfigurationError) as caught:
        filled({"env": ["A", "B=1", "C"]}, environ={"B": "2"})
    assert str(caught.value) == (
        'env: expected values for A, C, got none. Pass env={"A": ..., "C": ...}, or set them in the '
        "environment of this process."
    )


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (["A=1", "A=2"], r"Task\.env: expected each name once, got A twice"),
        (["A", "A"], r"Task\.env: expected each name once, got A twice"),
        (["A = 1"], r"Task\.env: expected NAME=value or NAME as item 1, got something else"),
        (["B=1", "1A=2"], r"Task\.env: expected NAME=value or NAME as item 2"),
        (["A-B=2"], r"Task\.env: expected NAME=value or NAME as item 1"),
        ([42], r"Task\.env: expected NAME=value or NAME as item 1"),
        ({"A": True}, r"Task\.env: expected a string for A, got a bool"),
        ({"A": [1]}, r"Task\.env: expected a string for A, got a list"),
        ("A=1", r"Task\.env"),
    ],
)
def test_what_dstack_refuses_in_env_is_refused(env: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        load_configuration({**TASK, "env": env})


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (["A=1"], r"env: expected a mapping such as \{\"NAME\": \"value\"\}, got a list"),
        ({"A B": "1"}, r"env: expected names of variables such as HF_TOKEN, got 'A B'"),
        ({"A": None}, r"env: expected a string for A, got a NoneType"),
        ({"A": True}, r"env: expected a string for A, got a bool"),
    ],
)
def test_a_wrong_env_argument_is_refused(env: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        filled({}, env=env)


def test_references_to_env_are_filled_in_where_dstack_does_so() -> None:
    service = fill_in(
        Service(
            port=80,
            commands=["serve"],
            env={"TOKEN": "s3cr3t", "WHO": None},
            image="i",
            registry_auth=RegistryAuth(username="${{ env.WHO }}", password="${{ secrets.p }}-${{env.TOKEN}}"),
            probes=[
                {
                    "type": "http",
                    "url": "/${{ env.WHO }}",
                    "method": "post",
                    "body": "x${{ env.TOKEN }}",
                    "headers": [{"name": "Authorization", "value": "Bearer ${{ env.TOKEN }}"}],
                }
            ],
        ),
        env=None,
        args=None,
        environ={"WHO": "me"},
    )
    assert isinstance(service, Service)
    assert service.registry_auth is not None
    assert (service.registry_auth.username, service.registry_auth.password) == (
        "me",
        "${{ secrets.p }}-s3cr3t",
    )
    assert service.probes is not None
    assert dict(service.probes[0]) == {
        "type": "http",
        "url": "/me",
        "method": "post",
        "body": "xs3cr3t",
        "headers": [{"name": "Authorization", "value": "Bearer s3cr3t"}],
    }
    assert "s3cr3t" not in repr(service)


@pytest.mark.parametrize(
    "data",
    [
        {"registry_auth": {"username": "u", "password": "${{ env.NOWHERE }}"}},
        {"registry_auth": {"username": "${{ env.NOWHERE }}", "password": "p"}},
        {"type": "service", "port": 80, "probes": [{"type": "http", "url": "/${{ env.NOWHERE }}"}]},
    ],
)
def test_a_reference_to_a_missing_variable_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"(registry_auth|probes).*, got \$\{\{ env\.NOWHERE \}\}"):
        filled({"image": "i", "env": {"OTHER": "1"}, **data})


def test_an_error_names_secrets_only_where_a_server_fills_them_in() -> None:
    probe = {"type": "http", "url": "/${{ env.A }}"}
    with pytest.raises(ConfigurationError) as caught:
        filled({"type": "service", "port": 80, "probes": [probe]})
    assert str(caught.value) == (
        "probes, item 1, url: expected a reference such as ${{ env.NAME }}, got ${{ env.A }}. Name a variable "
        "of env, or write $${{ to keep the text as it is."
    )
    with pytest.raises(
        ConfigurationError, match=r"such as \$\{\{ env.NAME }} or \$\{\{ secrets.NAME }}, got"
    ):
        filled({"registry_auth": {"username": "${{ env.A }}", "password": "p"}})
    sent = filled({"commands": ["echo ${{ secrets.A }}"]})
    assert sent.commands == ["echo ${{ secrets.A }}"], "as dstack's client does"


@pytest.mark.parametrize("password", ["${{ hunter2 }}", "${{hunter2", "${{ hunter2.hunter2.x }}"])
def test_no_error_shows_a_password(password: str) -> None:
    with pytest.raises(ConfigurationError, match=r"registry_auth\.password: expected a reference") as caught:
        filled({"registry_auth": {"username": "u", "password": password}})
    assert "hunter2" not in str(caught.value)


ARGS = "A 'b c'"


# The command that dstack 0.22.5's own client sends for each.
@pytest.mark.parametrize(
    ("command", "sent"),
    [
        ("x ${{ run.args }} y", "x A 'b c' y"),
        ("${{run.args}}${{ run.args\n }}", "A 'b c'A 'b c'"),
        ("$${{ run.args }}", "${{ run.args }}"),
        ("$${{ x", "${{ x"),
        ("$$${{ run.args }}", "$A 'b c'"),
        ("$$$${{ run.args }}", "$${{ run.args }}"),
        ("$${{ a }} ${{ run.args }}", "${{ a }} A 'b c'"),
        ("kill $$ ${{ run.args }}", "kill $ A 'b c'"),
        ("echo $A $$ ${{ run.args }} $$", "echo $A $$ A 'b c' $"),
        ("echo ${A} ${{ run.args }} $", "echo ${A} A 'b c' $"),
        ("echo ${{ secrets.x }}", "echo ${{ secrets.x }}"),
        ("ping ${{ groups[0].nodes[1].IP_ADDRESS }}", "ping ${{ groups[0].nodes[1].IP_ADDRESS }}"),
        ("}} ${ {x} } $", "}} ${ {x} } $"),
    ],
)
def test_arguments_are_filled_in_as_dstack_does(command: str, sent: str) -> None:
    assert filled({"commands": [command]}, args=["A", "b c"]).commands == [sent]


# The two cases in which we read `$$` differently from dstack 0.22.5's client, which sends what is in the
# comment (see docs/configurations.md).
@pytest.mark.parametrize(
    ("command", "sent"),
    [
        ("kill $$", "kill $$"),  # kill $
        ("echo $A $${{ run.args }}", "echo $A ${{ run.args }}"),  # echo $A $A 'b c'
    ],
)
def test_dollars_that_a_shell_needs_stay(command: str, sent: str) -> None:
    assert filled({"commands": [command]}, args=["A", "b c"]).commands == [sent]


@pytest.mark.parametrize(
    "reference",
    [
        "${{ env.A }}",
        "${{ github.sha }}",
        "${{ x }}",
        "${{ }}",
        "${{ secrets.a-b }}",
        "${{ secrets.a.b }}",
        "${{ groups[a].nodes[1].IP_ADDRESS }}",
        "${{ run.args",
    ],
)
def test_a_reference_that_nothing_fills_in_is_refused(reference: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        filled({"env": ["A=1"], "commands": ["true", f"echo {reference}"]})
    assert str(caught.value) == (
        "commands, item 2: expected a reference such as ${{ run.args }}, got "
        f"{reference}. Use $NAME for a variable of env, or write $${{{{ to keep the text as it is."
    )


def test_without_arguments_the_reference_becomes_empty() -> None:
    assert filled({"commands": ["train ${{ run.args }} end"]}).commands == ["train  end"]


def test_arguments_reach_the_commands_of_groups() -> None:
    task = filled(
        {"commands": None, "groups": [{"commands": ["a ${{ run.args }}"]}, {"commands": [7], "nodes": 2}]},
        args=["x", 1],
    )
    assert isinstance(task, Task)
    assert task.groups == [{"commands": ["a x 1"]}, {"commands": ["7"], "nodes": 2}]
    service = filled(
        {"type": "service", "port": 80, "commands": None, "replicas": [{"commands": ["${{ run.args }}"]}]},
        args=["x"],
    )
    assert isinstance(service, Service)
    assert service.replicas == [{"commands": ["x"]}]


@pytest.mark.parametrize("args", ["--epochs 3", 3, [["a"]], [True], {"a": 1}])
def test_arguments_must_be_a_list_of_texts(args: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"args: expected a list of strings such as \[\"--epochs\""):
        filled({"commands": ["${{ run.args }}"]}, args=args)


def test_a_configuration_takes_arguments_if_a_command_refers_to_them() -> None:
    assert takes_args(load_configuration({**TASK, "commands": ["x ${{ run.args }}"]}))
    assert takes_args(load_configuration({"type": "task", "groups": [{"commands": ["x ${{run.args}}"]}]}))
    assert not takes_args(load_configuration(TASK))


def test_nothing_to_fill_in_changes_nothing() -> None:
    task = load_configuration({**TASK, "env": {"A": "1"}, "commands": ["echo $A $$"]})
    assert fill_in(task, env=None, args=None, environ={"A": "2"}) is task


def test_the_values_of_an_interpolator_are_in_no_repr() -> None:
    assert "s3cr3t" not in repr(Interpolator({"env.A": "s3cr3t"}, (SECRET, ADDRESS), "", ""))
