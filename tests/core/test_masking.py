"""The secrets of a run, and how they are masked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dstack_core import RegistryAuth, Task, parse_configuration
from dstack_core.integration import Masker, collect_secrets, mask, mask_value

ENV = {"KEY": "swordfish", "STEPS": "100000", "FLAG": "false", "SHORT": "abc"}


def test_what_is_masked_and_what_stays_readable() -> None:
    masker = Masker([None, "", "abcd", "12345.5", "False", "s3cr3t.*", "s3cr3t.*longer"])
    assert (
        masker.mask("abcd 12345.5 False s3cr3t.* s3cr3t.*longer s3cr3txx")
        == "abcd 12345.5 False *** *** s3cr3txx"
    )
    assert Masker().mask("nothing to mask") == "nothing to mask"


def test_each_line_of_a_secret_is_masked() -> None:
    key = "-----BEGIN-----\nMIIE1\nend\n"
    assert mask("a\nMIIE1\nend\n-----BEGIN----- b", [key]) == "a\n***\nend\n*** b"


def test_a_secret_that_contains_another_is_masked_whole() -> None:
    masker = Masker(["token"])
    masker.add(["token-of-a-friend"])
    assert masker.mask("token-of-a-friend, token") == "***, ***"


@pytest.mark.parametrize(
    "form",
    [
        Task(commands=["x"], env=ENV),
        {"type": "task", "commands": ["x"], "env": ENV},
        {"type": "task", "commands": ["x"], "env": [f"{name}={value}" for name, value in ENV.items()]},
        parse_configuration(f"type: task\ncommands: [x]\nenv: {json.dumps(ENV)}\n"),
    ],
    ids=["model", "dict", "list", "yaml"],
)
def test_secrets_are_found_in_every_form_of_a_configuration(form: Any) -> None:
    assert collect_secrets(form) == ["swordfish"]


def test_the_password_of_a_registry_and_other_secrets_are_found() -> None:
    auth = {"username": "u", "password": "docker-pass"}
    assert collect_secrets({"type": "task", "image": "i", "registry_auth": auth}) == ["docker-pass"]
    model = Task(image="i", commands=["x"], registry_auth=RegistryAuth(username="u", password="docker-pass"))
    assert collect_secrets(model, others=["token", None]) == ["docker-pass", "token"]


def test_the_env_beside_a_configuration_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "of-this-process")
    monkeypatch.delenv("NOT_HERE", raising=False)
    configuration = {"type": "task", "env": {"KEY": "replaced", "OTHER": "stays-there"}}
    env = {"KEY": "swordfish", "FROM_HERE": None, "NOT_HERE": None}
    assert collect_secrets(configuration, env=env) == ["swordfish", "stays-there", "of-this-process"]
    assert collect_secrets(env=["KEY=swordfish=1", "FROM_HERE"]) == ["swordfish=1", "of-this-process"]


@pytest.mark.parametrize(
    "form", [None, {"type": "dance"}, {"env": 5, "registry_auth": "x"}, {"env": [5, None]}]
)
def test_an_invalid_configuration_has_no_secrets(form: Any) -> None:
    assert collect_secrets(form) == []


def test_a_value_without_secrets_is_the_same_object() -> None:
    value = {"a": [1, "plain", (2.5, None)], "b": {"c": True}}
    assert mask_value(value, Masker(["hidden-word"]).mask) is value


def test_secrets_in_a_value_are_replaced_wherever_they_are() -> None:
    value = {"a hidden-word": ["x", ("hidden-word", 1)], "b": {"c": {"hidden-word": 2}}, "kept": {3}}
    shown = mask_value(value, Masker(["hidden-word"]).mask)
    assert shown == {"a ***": ["x", ("***", 1)], "b": {"c": {"***": 2}}, "kept": {3}}
