"""Tags of a run: which are sent, to which servers, and which are refused."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest

from dstack_core import Client, Configuration, Profile, Task, errors
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.integration import check_tags, run_name, tag_value
from dstack_core.models.options import SubmitOptions
from tests.core.scripted import LOST, MISSING, Driver, Script, reply, run_json
from tests.core.test_version_check import INFO, server

TASK = Task(commands=["x"])
DEFAULTS = {"team": "default", "cost-center": "7"}
REFUSED = reply({"detail": [{"msg": "extra fields not permitted"}]}, 422)


def submit(
    driver: Driver,
    script: Script,
    configuration: Configuration = TASK,
    use: Operations | None = None,
    **options: Any,
) -> Any:
    operations = use or Operations(
        Api("http://server", "main"), 30.0, clock=driver.clock, default_tags=DEFAULTS
    )
    flow = operations.submit(
        configuration,
        "train",
        cast(SubmitOptions, options),
        verify_ports=False,
        marker="mine",
        retry_budget=None,
    )
    return driver.run(flow, script)


def sent(script: Script) -> list[Any]:
    return [body["plan"]["run_spec"]["configuration"].get("tags") for body in script.bodies("runs/apply")]


@pytest.mark.parametrize(
    ("own", "profile", "option", "tags"),
    [
        (None, None, None, DEFAULTS),
        (None, None, {"team": "option"}, {**DEFAULTS, "team": "option"}),
        ({"team": "own"}, None, {"team": "option", "a": "b"}, {**DEFAULTS, "team": "own", "a": "b"}),
        (None, {"team": "profile"}, {"a": "b"}, {**DEFAULTS, "team": "profile", "a": "b"}),
        # As a server, which takes the configuration's tags instead of the profile's.
        ({"x": "own"}, {"team": "profile"}, None, {**DEFAULTS, "x": "own"}),
        (None, {"team": "profile"}, None, {**DEFAULTS, "team": "profile"}),
        (None, None, False, None),
        ({"team": "own"}, None, False, {"team": "own"}),
    ],
)
def test_the_users_own_tags_win_over_an_option_and_that_over_the_clients(
    driver: Driver, own: Any, profile: Any, option: Any, tags: Any
) -> None:
    script = server("0.22.5")
    given: dict[str, Any] = {} if profile is None else {"profile": Profile(tags=profile)}
    submit(driver, script, Task(commands=["x"], tags=own), tags=option, **given)
    assert sent(script) == [tags]
    # Only what a user wrote is worth a request for the version.
    assert ("server/get_info" in script.paths()) is any((own, profile, option))


def test_a_plan_needs_no_tags_and_is_asked_for_without_them(driver: Driver) -> None:
    script = Script(
        users__get_my_user=[reply({"username": "a", "ssh_public_key": "k"})], runs__get_plan=[LOST]
    )
    use = Operations(Api("http://server", "main"), 0.0, clock=driver.clock, default_tags=DEFAULTS)
    with pytest.raises(errors.ServerUnreachableError):
        driver.run(use.plan(TASK, SubmitOptions()), script)
    assert "tags" not in script.bodies("runs/get_plan")[0]["run_spec"]["configuration"]


def test_a_server_without_tags_gets_the_run_without_those_of_the_client(driver: Driver) -> None:
    accepted = [REFUSED, reply(run_json())]
    script = server("0.18.44", runs__get=[MISSING], runs__apply=accepted)
    use = Operations(Api("http://server", "main"), 30.0, clock=driver.clock, default_tags=DEFAULTS)
    assert submit(driver, script, use=use).name == "train"
    assert sent(script) == [DEFAULTS, None]
    # From then on it is known.
    again = server("0.18.44", runs__get=[MISSING])
    submit(driver, again, use=use)
    assert (sent(again), "server/get_info" in again.paths()) == ([None], False)


@pytest.mark.parametrize("release", ["0.22.5", None])
def test_a_refusal_of_a_server_with_tags_is_reported(driver: Driver, release: str | None) -> None:
    script = server(release, runs__get=[MISSING], runs__apply=[REFUSED])
    with pytest.raises(errors.RequestRejectedError, match="extra fields"):
        submit(driver, script)
    assert sent(script) == [DEFAULTS]


def test_a_refusal_is_reported_if_the_version_is_unknown(driver: Driver) -> None:
    script = server("0.18.44", runs__get=[MISSING], runs__apply=[REFUSED], **{INFO: [LOST]})
    with pytest.raises(errors.RequestRejectedError, match="extra fields"):
        submit(driver, script)


def test_tags_that_the_user_wants_are_reported_as_missing_on_an_old_server(driver: Driver) -> None:
    script = server("0.18.44")
    with pytest.raises(errors.UnsupportedServerError, match=r"tags: needs dstack >= 0\.19\.5"):
        submit(driver, script, tags={"team": "ml"})
    assert script.paths() == ["server/get_info"]


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        (
            {"a b": "c"},
            r"tags: expected a key of 1 to 60 letters \(a to z\), digits, hyphens and underscores, got 'a b'\. Rename",
        ),
        ({"k" * 61: "c"}, "tags: expected a key of 1 to 60"),
        ({1: "c"}, "tags: expected a key of 1 to 60 .*, got 1"),
        ({"team": "ü"}, r"tags: expected a value of at most 256 letters .* for team, got 'ü'"),
        ({"team": "x" * 257}, "tags: expected a value of at most 256 .* for team"),
        ({"team": 7}, "tags: expected a value .* for team, got 7"),
        ("team=ml", r'tags: expected a dict such as {"team": "ml"}, got \'team=ml\''),
        (True, r"tags: expected a dict .*, got True"),
    ],
)
def test_a_tag_that_no_server_takes_is_refused_by_name_before_any_request(
    driver: Driver, tags: Any, text: str
) -> None:
    with pytest.raises(errors.ConfigurationError, match=f"^{text}"):
        submit(driver, Script(), tags=tags)
    if isinstance(tags, dict) and all(isinstance(value, str) for value in tags.values()) and 1 not in tags:
        with pytest.raises(errors.ConfigurationError, match=f"^{text}"):
            submit(driver, Script(), Task(commands=["x"], tags=tags))
    with pytest.raises(errors.ConfigurationError, match=f"^default_{text}"):
        Client(server_url="http://x", project_name="p", user_token="t", default_tags=tags)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("etl", "etl"),
        ("Train Nightly", "train-nightly"),
        ("scheduled__2026-11-23T12:00:00+00:00", "scheduled__2026-11-23t12-00-00-00-00"),
        ("Ärzte", "arzte"),
        ("Grüße Flow", "grusse-flow"),
        ("训练", "value-a29c0d"),
        ("训练 1", "1-bcd76e"),
        ("", ""),
        ("--", ""),
        (3, "3"),
        ("a" * 63, "a" * 63),
        ("a" * 64, f"{'a' * 56}-ffe054"),
    ],
)
def test_a_value_is_valid_on_every_cloud(text: object, value: str) -> None:
    assert tag_value(text) == value
    assert check_tags("tags", {"key": tag_value(text)}) == {"key": value}


@pytest.mark.parametrize("text", ["Grüße Flow", "Łódź æ", "Train Nightly"])
def test_the_name_of_a_run_and_its_tag_show_the_same_of_a_text(text: str) -> None:
    assert run_name([text], "x").startswith(tag_value(text))


def test_a_text_of_which_nothing_is_left_has_a_value_of_its_own() -> None:
    night, day = tag_value("夜間実行", default="flow"), tag_value("昼間実行", default="flow")
    assert night != day
    assert re.fullmatch("flow-[0-9a-f]{6}", night)
