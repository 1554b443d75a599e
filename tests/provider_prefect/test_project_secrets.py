"""Secrets of Prefect as project secrets: references in the run, no value anywhere, nothing left."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from prefect import State, flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run
from prefect.states import Cancelling, Completed, Crashed, Running
from pydantic import SecretStr

import dstack_core as core
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    _orphaned_runs,
    arun_task,
    run_task,
    stop_dstack_runs,
    submit_run,
    sync_secrets,
    wait_for_run,
)
from prefect_dstack._names import Owner
from prefect_dstack._resource_names import identify_secret, owner_of_secret
from prefect_dstack.reaper import describe, reap

from .support import the_run

pytestmark = pytest.mark.usefixtures("prefect_server")

VALUE = "hf_0123456789abcdef"
PRINTS: dict[str, Any] = {"type": "task", "commands": ["echo got $HF_TOKEN and ${#HF_TOKEN} characters"]}


def names(server: LocalServer) -> list[str]:
    with server.client() as client:
        return [secret.name for secret in client.secrets.list()]


def test_a_run_gets_the_value_by_reference_and_shows_it_nowhere(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    @flow
    def train() -> dict[str, Any]:
        secrets = sync_secrets({"HF_TOKEN": SecretStr(VALUE)}, credentials)
        assert VALUE not in repr(secrets)
        with secrets as env:
            (name,) = names(dstack)
            assert name.startswith(f"prefect_f_{flow_run.id.replace('-', '')}_")
            assert env == {"HF_TOKEN": f"${{{{ secrets.{name} }}}}"}
            return dict(run_task(PRINTS, credentials, env=env, poll_interval=0.1))

    outcome = train()
    assert names(dstack) == []
    run = the_run(dstack)
    assert b"got hf_0123456789abcdef and 19 characters" in b"".join(run.logs())
    assert VALUE not in json.dumps(run.env)
    assert VALUE not in json.dumps(outcome, default=str)
    assert "got *** and 19 characters" in caplog.text
    assert VALUE not in caplog.text


def test_the_async_block_takes_a_secret_block(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    async def train() -> str:
        async with sync_secrets({"HF_TOKEN": Secret(value=SecretStr(VALUE))}, credentials) as env:
            return (await arun_task(PRINTS, credentials, env=env, poll_interval=0.1))["status"]

    assert asyncio.run(train()) == "done"
    assert names(dstack) == []
    assert VALUE.encode() in b"".join(the_run(dstack).logs())


def test_an_exception_deletes_the_secret(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def failing() -> None:
        with sync_secrets({"A": SecretStr(VALUE), "B": SecretStr(VALUE)}, credentials):
            assert len(names(dstack)) == 2
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        failing()
    assert names(dstack) == []


def test_a_cancelled_async_block_deletes_the_secret(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    async def main() -> None:
        entered = asyncio.Event()

        async def endless() -> None:
            async with sync_secrets({"A": SecretStr(VALUE)}, credentials):
                entered.set()
                await asyncio.sleep(60)

        running = asyncio.ensure_future(endless())
        await asyncio.wait_for(entered.wait(), 60)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert names(dstack) == []


def test_a_secret_for_good_is_kept_and_replaced_only_on_request(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    given = {"TEAM_TOKEN": SecretStr(VALUE)}
    with sync_secrets(given, credentials, keep=True) as env:
        assert env == {"TEAM_TOKEN": "${{ secrets.TEAM_TOKEN }}"}
    assert names(dstack) == ["TEAM_TOKEN"]
    with (
        pytest.raises(core.ConfigurationError, match="overwrite=True") as refused,
        sync_secrets(given, credentials, keep=True),
    ):
        pytest.fail("must not be entered")
    assert VALUE not in str(refused.value)
    with sync_secrets(given, credentials, keep=True, overwrite=True):
        pass
    assert names(dstack) == ["TEAM_TOKEN"]


def test_what_cannot_be_deleted_is_logged_without_the_value(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    @flow
    def work() -> None:
        with sync_secrets({"A": SecretStr(VALUE)}, credentials):
            dstack.faults.add("/secrets/delete", status=403, times=None)

    work()
    assert "could not be deleted" in caplog.text
    assert VALUE not in caplog.text


def test_a_failed_set_deletes_what_was_set(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def work() -> None:
        with sync_secrets({"A": SecretStr(VALUE), "B": SecretStr("x" * 5001)}, credentials):
            pytest.fail("must not be entered")

    with pytest.raises(core.RequestRejectedError) as refused:
        work()
    assert VALUE not in str(refused.value)
    assert names(dstack) == []


@pytest.mark.parametrize(
    ("secrets", "options", "text"),
    [
        ({}, {}, "expected Secret blocks by name"),
        ("HF_TOKEN", {}, "expected Secret blocks by name"),
        ({"HF-TOKEN": SecretStr(VALUE)}, {}, "letters, digits and underscores"),
        ({"A" * 300: SecretStr(VALUE)}, {}, r"at most 100 characters, got A{20}\.\.\. with 300\."),
        ({"A": VALUE}, {}, "a Secret block or SecretStr for A, got str"),
        ({"A": SecretStr("")}, {}, "got an empty text"),
        ({"A": Secret(value={"a": 1})}, {}, "got dict"),  # type: ignore[arg-type]
        ({"A": SecretStr(VALUE)}, {"overwrite": True}, "expected keep=True with it"),
        ({"A": SecretStr(VALUE)}, {"keep": "yes"}, "keep: expected True or False"),
    ],
)
def test_wrong_values_are_refused_and_not_shown(secrets: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(core.ConfigurationError, match=text) as refused:
        sync_secrets(secrets, **options)
    assert VALUE not in str(refused.value)


def test_outside_of_a_flow_secrets_that_nothing_could_delete_are_refused(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    secrets = sync_secrets({"A": SecretStr(VALUE)}, credentials)
    with pytest.raises(core.ConfigurationError, match=r"^sync_secrets: expected a flow or a task"), secrets:
        pytest.fail("must not be entered")
    assert names(dstack) == []


@flow
def idle() -> None:
    """Do nothing; a flow run needs a flow."""


def left_over(server: LocalServer, state: State[Any]) -> FlowRun:
    """Return a flow run in that state whose secret was left."""
    with get_client(sync_client=True) as api:
        run = api.create_flow_run(idle)
        api.set_flow_run_state(run.id, state, force=True)
    with server.client() as client:
        client.secrets.set(identify_secret(Owner(str(run.id), str(run.id), 1, True), "HF_TOKEN"), VALUE)
        client.secrets.set("BY_HAND", VALUE)
    return run


@pytest.mark.parametrize("make", [Completed, Crashed])
def test_the_reaper_deletes_the_secret_of_a_flow_run_that_has_ended(
    make: Callable[[], State[Any]], dstack: LocalServer, credentials: DstackCredentials
) -> None:
    left_over(dstack, make())
    (would,) = reap(credentials, min_age=0, dry_run=True)
    assert re.fullmatch(
        r"Would delete: secret prefect_f_\w+ of flow_run/\S+ \(\w+\): .*", describe(would, dry_run=True)
    )
    (finding,) = reap(credentials, min_age=0)
    assert (finding["kind"], finding["stopped"]) == ("secret", True)
    assert names(dstack) == ["BY_HAND"]


def test_the_reaper_leaves_the_secret_of_a_flow_run_that_runs(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    left_over(dstack, Running())
    (finding,) = reap(credentials, min_age=0)
    assert not finding["stopped"]
    assert len(names(dstack)) == 2


def test_the_hook_deletes_the_secret(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_orphaned_runs, "_PAUSE", 0.1)
    owner = left_over(dstack, Running())
    stop_dstack_runs(credentials)(idle, owner, Cancelling())
    assert names(dstack) == ["BY_HAND"]


def test_a_server_without_secrets_is_one_clear_error(
    credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise core.UnsupportedServerError("project secrets need dstack >= 0.19.17")

    for method in ("set", "list", "delete"):
        monkeypatch.setattr(f"dstack_core.resource_collections.SecretCollection.{method}", refuse)

    @flow
    def work() -> None:
        with sync_secrets({"A": SecretStr(VALUE)}, credentials):
            pytest.fail("must not be entered")

    with pytest.raises(core.UnsupportedServerError, match=r"0.19.17"):
        work()
    assert "could not be deleted" not in caplog.text
    assert reap(credentials, min_age=0) == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "prefect_s_" + "0" * 32 + "_0_A", "prefect_f_12_0_A"])
def test_other_names_have_no_owner(name: str) -> None:
    assert owner_of_secret(name) is None


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_is_followed_by_another_task_shows_no_value(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture, keep: bool
) -> None:
    """Inside the block, after it, in a block of another secret, by dict and by name."""
    token = f"{VALUE}{keep}"
    quick: dict[str, Any] = {"poll_interval": 0.1}

    @flow
    def train() -> None:
        with sync_secrets({"HF_TOKEN": SecretStr(token)}, credentials, keep=keep, overwrite=keep) as env:
            runs = [submit_run({**PRINTS, "name": f"part-{each}"}, credentials, env=env) for each in range(4)]
            wait_for_run(runs[0], credentials, **quick)
            wait_for_run.submit(runs[1], credentials, **quick).result()
            with sync_secrets({"OTHER": SecretStr("another_value")}, credentials):
                wait_for_run(runs[2]["run_name"], credentials, **quick)
            # The server has resolved the reference once the job has begun.
            wait_for_run(runs[3], credentials, stream_logs=False, **quick)
        wait_for_run(runs[3], credentials, **quick)

    train()
    assert caplog.text.count(f"got *** and {len(token)} characters") == 4
    assert token not in caplog.text
