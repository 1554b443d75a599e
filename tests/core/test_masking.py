"""The secrets of a run, and how they are masked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dstack_core import ConfigurationError, Progress, RegistryAuth, ReportedSoFar, Task, parse_configuration
from dstack_core.integration import (
    MaskEnv,
    Masker,
    check_mask_env,
    check_masked_names,
    collect_secrets,
    mask,
    mask_progress,
    mask_value,
)

ENV = {"KEY": "swordfish", "STEPS": "100000", "USE_AUTH": "false", "PIN_TOKEN": "abc", "STAGE": "train"}


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
    monkeypatch.setenv("KEY_FROM_HERE", "of-this-process")
    monkeypatch.delenv("KEY_NOT_HERE", raising=False)
    configuration = {"type": "task", "env": {"KEY": "replaced", "OTHER_TOKEN": "stays-there"}}
    env = {"KEY": "swordfish", "KEY_FROM_HERE": None, "KEY_NOT_HERE": None}
    assert collect_secrets(configuration, env=env) == ["swordfish", "stays-there", "of-this-process"]
    assert collect_secrets(env=["KEY=swordfish=1", "KEY_FROM_HERE"]) == ["swordfish=1", "of-this-process"]


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


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("secrets", ["hf_abcdef", "declared-word"]),
        ("all", ["hf_abcdef", "train", "declared-word"]),
        ("none", ["declared-word"]),
        (["STAGE"], ["hf_abcdef", "train", "declared-word"]),
    ],
)
def test_which_values_of_an_environment_are_masked(mode: MaskEnv, found: list[str]) -> None:
    env = {"HF_TOKEN": "hf_abcdef", "STAGE": "train", "EPOCHS": "10000", "WORD": "declared-word"}
    secrets = collect_secrets(env=env, mask_env=mode, secret_names=["WORD", "MISSING"])
    assert sorted(secrets) == sorted(found)
    # The password of a registry and the token are not in the environment.
    auth = {"registry_auth": {"username": "u", "password": "docker-pass"}}
    assert collect_secrets(auth, others=["server-token"], mask_env=mode) == ["docker-pass", "server-token"]


def test_what_a_sweep_ran_with_stays_readable() -> None:
    env = {"STAGE": "train", "EPOCHS": "10000", "MODEL": "llama", "HF_TOKEN": "hf_abcdefgh"}
    line = "training of llama: stage train, 10000 epochs, hf_abcdefgh"
    assert mask(line, collect_secrets(env=env)) == "training of llama: stage train, 10000 epochs, ***"


def test_the_option_is_checked() -> None:
    assert [check_mask_env(value) for value in ("secrets", "all", "none")] == ["secrets", "all", "none"]
    assert check_mask_env({"LICENSE", "A"}) == check_mask_env(("LICENSE", "A")) == ["A", "LICENSE"]
    for value in ("secret", None, True, 5, [5], [""], {"A": "b"}):
        with pytest.raises(
            ConfigurationError, match=r'mask_env: expected "secrets", "all", "none" or a list'
        ):
            check_mask_env(value)


def test_a_position_is_stored_without_the_secrets_in_what_was_reported() -> None:
    reported = ReportedSoFar(results=({"word": "hidden-word", "n": 1},), metrics={"loss": 0.5})
    progress = Progress("run", reported=reported).to_dict()
    shown = mask_progress(progress, Masker(["hidden-word"]).mask)
    assert shown["reported"] == {**progress["reported"], "results": [{"word": "***", "n": 1}]}
    assert {**shown, "reported": None} == {**progress, "reported": None}
    assert Progress.from_dict(shown).reported.results == ({"word": "***", "n": 1},)
    assert mask_progress({"run_name": "a"}, Masker(["hidden-word"]).mask) == {"run_name": "a"}


@pytest.mark.parametrize(
    ("names", "configuration", "env"),
    [
        ("all", None, None),
        (["LICENSE"], {"env": {"LICENSE": "x"}}, None),
        (["license"], Task(commands=["x"], env=["LICENSE=x"]), None),
        (["LICENSE", "B"], {"env": ["B=1"]}, {"LICENSE": "x"}),
        (["TRACEPARENT", "PREFECT_API_KEY", "OPENLINEAGE_URL"], None, None),
    ],
)
def test_names_that_a_run_has(names: Any, configuration: Any, env: Any) -> None:
    check_masked_names(names, configuration, env)


@pytest.mark.parametrize(
    ("configuration", "env", "words"),
    [
        (None, None, r"\(which is empty\), got 'NOPE'. Correct it, add NOPE to env, or leave it out."),
        ({"env": {"B": "1"}}, {"A": "2"}, r"\(A, B\), got 'NOPE'. Correct it"),
        ({"env": {"NOPES": "1"}}, None, r"\(NOPES\), got 'NOPE'. Did you mean 'NOPES'\?"),
        (None, {f"V{i:02}": "x" for i in range(12)}, r"\(V00, .*, V09, \.\.\.\), got 'NOPE'"),
    ],
)
def test_a_name_that_no_variable_has_is_refused(configuration: Any, env: Any, words: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"mask_env: expected names of variables in the run's env {words}"
    ):
        check_masked_names(["NOPE"], configuration, env)
