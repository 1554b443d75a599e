"""Secrets of the embedded server's project: the replies of a real 0.22.5, and jobs that use them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import requests

from dstack_core.local.references import UnfilledReference, fill_in
from tests.local.support import Api, ending

VALUE = "s3cr3t-v4lue"


def _refusal(api: Api, path: str, body: Any) -> tuple[int, str, str]:
    reply = api.call(path, body)
    detail = reply.json()["detail"][0]
    return reply.status_code, detail["code"], detail["msg"]


def test_secrets_are_set_listed_read_and_deleted_as_on_a_real_server(make: Callable[..., Api]) -> None:
    api = make()
    assert api.ok("{p}/secrets/list") == []
    assert api.ok("{p}/secrets/list", {}) == []
    first = api.ok("{p}/secrets/create_or_update", {"name": "tok", "value": "s3"})
    assert first == {"id": first["id"], "name": "tok", "value": "s3"}
    again = api.ok("{p}/secrets/create_or_update", {"name": "tok", "value": "s4"})
    assert again == {"id": first["id"], "name": "tok", "value": "s4"}
    assert api.ok("{p}/secrets/list", {}) == [{"id": first["id"], "name": "tok", "value": None}]
    assert api.ok("{p}/secrets/get", {"name": "tok"}) == again
    other = api.ok("{p}/secrets/create_or_update", {"name": "other", "value": "x" * 5000})
    assert [one["id"] for one in api.ok("{p}/secrets/list")] == [other["id"], first["id"]], "newest first"
    assert api.ok("{p}/secrets/delete", {"secrets_names": ["tok", "other"]}) is None
    assert api.ok("{p}/secrets/list") == []


def test_refusals_have_the_words_of_a_real_server(api: Api) -> None:
    rule = "Secret name should match regex '^[A-Za-z0-9-_]{1,200}$"
    for name in ("bad name", "", "x" * 201, "a b\n"):
        body = {"name": name, "value": "s4"}
        assert _refusal(api, "{p}/secrets/create_or_update", body) == (400, "error", rule)
    long = {"name": "long", "value": "x" * 5001}
    assert _refusal(api, "{p}/secrets/create_or_update", long) == (
        400, "error", "Secret value length must not exceed 5000",
    )  # fmt: skip
    assert _refusal(api, "{p}/secrets/get", {"name": "none"}) == (
        400, "resource_not_exists", "Resource not found",
    )  # fmt: skip
    assert _refusal(api, "{p}/secrets/delete", {"secrets_names": ["none", "no-more"]}) == (
        400, "resource_not_exists", "Secrets not found: none, no-more",
    )  # fmt: skip
    assert api.call("{p}/secrets/create_or_update", {"name": "half"}).status_code == 422


def test_a_missing_secret_leaves_the_others_undeleted(api: Api) -> None:
    api.ok("{p}/secrets/create_or_update", {"name": "kept", "value": "x"})
    assert api.call("{p}/secrets/delete", {"secrets_names": ["kept", "none"]}).status_code == 400
    assert api.ok("{p}/secrets/get", {"name": "kept"})["value"] == "x"


def test_a_job_gets_the_value_and_nothing_else_shows_it(make: Callable[..., Api]) -> None:
    api = make()
    api.ok("{p}/secrets/create_or_update", {"name": "token", "value": VALUE})
    env = {"TOKEN": "${{ secrets.token }}", "URL": "https://me:${{secrets.token}}@x/", "PLAIN": "a$b"}
    run = api.run(
        "uses-a-secret",
        'printf %s "$TOKEN $URL $PLAIN" | sha256sum',
        env=env,
        registry_auth={"username": "me", "password": "${{ secrets.token }}"},
    )
    expected = f"{VALUE} https://me:{VALUE}@x/ a$b"
    sha256 = hashlib.sha256(expected.encode()).hexdigest()
    assert api.output(run).split()[0] == sha256
    page = requests.get(f"{api.server.url}/projects/main/runs/{run['id']}", timeout=30).text
    events = api.ok("events/list", {})
    shown = json.dumps([run, api.ok("runs/list", {}), events, api.ok("{p}/secrets/list")]) + page
    assert VALUE not in shown
    assert VALUE not in repr([api.server, *api.server.runs]) + "".join(map(str, api.server.runs))
    assert run["run_spec"]["configuration"]["env"] == env
    assert run["jobs"][0]["job_spec"]["env"] == env


@pytest.mark.parametrize(
    ("configuration", "why"),
    [
        (
            {"env": {"A": "${{ secrets.nope }}"}},
            "Failed to interpolate due to missing vars: ['secrets.nope']",
        ),
        (
            {"registry_auth": {"username": "me", "password": "${{ secrets.nope }}"}},
            "Failed to interpolate due to missing vars: ['secrets.nope']",
        ),
        ({"env": {"A": "${{ secrets.my-token }}"}}, "Illegal reference name: secrets.my-token"),
        ({"env": {"A": "${{ secrets.a"}}, "No pattern closing: ${{ secrets.a"),
    ],
)
def test_a_job_without_its_secret_fails_as_on_a_real_server(
    api: Api, name: str, configuration: Any, why: str
) -> None:
    run = api.run(name, "echo never", **configuration)
    assert ending(run) == ("failed", "job_failed", "terminated", "terminated_by_server", None)
    message = run["latest_job_submission"]["termination_reason_message"]
    assert message == f"Secrets interpolation error: {why}"
    assert api.output(run) == ""


def test_a_secret_is_read_when_the_job_starts(make: Callable[..., Api]) -> None:
    api = make()
    api.ok("{p}/secrets/create_or_update", {"name": "token", "value": "first"})
    retry = {"on_events": ["error"], "duration": "1h"}
    api.apply(
        "again", 'echo "$TOKEN"; [ "$TOKEN" = second ]', env={"TOKEN": "${{ secrets.token }}"}, retry=retry
    )
    api.wait_output("again", "first")
    api.ok("{p}/secrets/create_or_update", {"name": "token", "value": "second"})
    run = api.wait("again")
    assert run["status"] == "done"
    assert api.output(run).strip() == "second"


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("plain", "plain"),
        ("", ""),
        ("$", "$"),
        ("a$", "a$"),
        ("$$", "$"),
        ("$${{ secrets.a }}", "${{ secrets.a }}"),
        ("${{ secrets.a }}-${{secrets.b}}", "1-2"),
        ("$HOME $$", "$HOME $$"),
        ("$HOME ${{ secrets.a }}", "$HOME 1"),
    ],
)
def test_references_are_filled_in_by_the_rules_of_the_server(text: str, filled: str) -> None:
    assert fill_in(text, {"secrets.a": "1", "secrets.b": "2"}) == filled


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("${{ secrets.a }} ${{ secrets.c }}", "missing vars: ['secrets.c']"),
        ("${{ secrets }}", "Illegal reference name: secrets"),
        ("${{ a.b.c }}", "Illegal reference name: a.b.c"),
        ("${{ secrets.1a }}", "Illegal reference name: secrets.1a"),
        ("x ${{ secrets.a", "No pattern closing: ${{ secrets.a"),
    ],
)
def test_references_without_a_value_are_errors_that_show_no_value(text: str, why: str) -> None:
    with pytest.raises(UnfilledReference, match=re.escape(why)):
        fill_in(text, {"secrets.a": "1"})
