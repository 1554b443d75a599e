"""Airflow's secrets as project secrets: references in the run, no value anywhere, nothing left."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG

import dstack_core as core
from airflow_provider_dstack._airflow_secrets import read_sources, values_to_mask
from airflow_provider_dstack._compat import AirflowFailException, TaskFacts, database_tasks
from airflow_provider_dstack._reap_secrets import reap_resources, reap_secrets, resource_failures
from airflow_provider_dstack._secret_owners import owner_of_secret, secret_names_of
from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted, DstackServerUnreachable
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.project_secrets import (
    DstackDeleteSecretsOperator,
    DstackSecretsOperator,
    dstack_secrets,
)
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner
from tests.provider_airflow.tries import STARTED
from tests.provider_airflow.versions import needs_3_2

VALUE = "hf_0123456789abcdef"
TEMPLATE = "{{ var.value.hf_token }}"
SECRETS = {"HF_TOKEN": TEMPLATE}
PRINTS = {"type": "task", "commands": ["echo got $HF_TOKEN and ${#HF_TOKEN} characters"]}
HEAD = """
from airflow_provider_dstack.project_secrets import DstackDeleteSecretsOperator, DstackSecretsOperator
from airflow_provider_dstack.project_secrets import dstack_secrets
"""
LOG = logging.getLogger("secrets")


@pytest.fixture(autouse=True)
def airflow_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"api": {"key": "key_0123456789"}}
    connection = {"conn_type": "generic", "host": "hub", "password": "pw_0123456789", "extra": extra}
    monkeypatch.setenv("AIRFLOW_VAR_HF_TOKEN", VALUE)
    monkeypatch.setenv("AIRFLOW_VAR_TEAM", '{"token": "team_0123456789", "empty": ""}')
    monkeypatch.setenv("AIRFLOW_CONN_HUB", json.dumps(connection))


@pytest.fixture
def client(server: LocalServer) -> Iterator[core.Client]:
    with server.client() as client:
        yield client


class Ti(SimpleNamespace):
    """A task instance with the XCom of the setup."""

    def xcom_pull(self, task_ids: Any = None, key: str = "return_value", map_indexes: int = -1) -> Any:
        return self.pulled if map_indexes < 0 or self.pulled is None else self.pulled[map_indexes]


def context_of(map_index: int = -1, task_id: str = "set", run_id: str = "r", started: Any = STARTED) -> Any:
    ti = Ti(dag_id="etl", run_id=run_id, task_id=task_id, try_number=1, map_index=map_index, pulled=None)
    return {"ti": ti, "dag_run": SimpleNamespace(start_date=started)}


def setting(secrets: Any = None, **options: Any) -> DstackSecretsOperator:
    return DstackSecretsOperator(task_id="set", secrets=secrets or SECRETS, retry_budget=5.0, **options)


def deleting(**options: Any) -> DstackDeleteSecretsOperator:
    return DstackDeleteSecretsOperator(task_id="delete", secrets_of="set", retry_budget=5.0, **options)


def names(client: core.Client) -> list[str]:
    return sorted(secret.name for secret in client.secrets.list())


@pytest.mark.parametrize(
    ("deferrable", "env"),
    [(False, "secrets.env"), (True, "{'STAGE': 'train', 'HF_TOKEN': secrets.env['HF_TOKEN']}")],
)
def test_runs_of_a_group_get_the_value_by_reference_and_show_it_nowhere(
    dag_runner: DagRunner,
    server: LocalServer,
    client: core.Client,
    capfd: pytest.CaptureFixture[str],
    *,
    deferrable: bool,
    env: str,
) -> None:
    ran = dag_runner.run_tasks(
        f"with dstack_secrets({SECRETS!r}) as secrets:\n"
        f"    DstackRunOperator(task_id='train', configuration={PRINTS!r}, env={env},\n"
        f"                      poll_interval=0.2, deferrable={deferrable})\n",
        HEAD,
    )
    assert ran.tasks == {
        "secrets.set_secrets": "success",
        "secrets.train": "success",
        "secrets.delete_secrets": "success",
    }
    (name,) = ran.values["secrets.delete_secrets"]
    assert ran.values["secrets.set_secrets"] == {"HF_TOKEN": f"${{{{ secrets.{name} }}}}"}
    assert names(client) == []
    (run,) = client.runs.list(all=True)
    assert run.env["HF_TOKEN"] == f"${{{{ secrets.{name} }}}}"
    assert f"got {VALUE} and 19 characters".encode() in b"".join(run.logs())
    shown = capfd.readouterr()
    assert "got *** and 19 characters" in shown.out + shown.err
    assert VALUE not in shown.out + shown.err
    assert VALUE not in json.dumps(ran.values, default=str)


@needs_3_2
def test_the_reapers_ask_the_airflow_they_run_in(dag_runner: DagRunner, client: core.Client) -> None:
    left = dag_runner.run_tasks(f"DstackSecretsOperator(task_id='set', secrets={SECRETS!r})\n", HEAD)
    (name,) = names(client)
    client.secrets.set(name.replace("dag", "gone"), "other")
    with database_tasks() as ask:
        found = reap_secrets(client, ask, dry_run=True, stop_unknown=False, log=LOG)
    assert sorted((one.state, one.action) for one in found) == [
        ("success", "would delete"),
        ("unknown", "left"),
    ]
    ran = dag_runner.run_tasks("DstackReapOperator(task_id='reap', min_age=0)\n")
    by_state = {one["state"]: (one["dag_run"].partition("/")[0], one["action"]) for one in ran.values["reap"]}
    assert by_state == {
        "success": (left.dag_id, "deleted"),
        "unknown": (left.dag_id.replace("dag", "gone"), "left"),
    }
    assert names(client) == [name.replace("dag", "gone")]


def test_tasks_mask_what_setups_upstream_read() -> None:
    with DAG("etl"):
        create = setting()
        mapped = DstackSecretsOperator.partial(task_id="mapped", secrets={"A": "{{ conn.hub.password }}"})
        each = mapped.expand(project_name=["one", "two"])
        first, last = (DstackRunOperator(task_id=one, configuration=PRINTS) for one in ("first", "last"))
        create >> first >> each >> last
    assert VALUE in first.secret_texts()
    assert first.synced_sources == {"set: HF_TOKEN": TEMPLATE}
    assert {VALUE, "pw_0123456789"} <= set(last.secret_texts())


def test_a_failed_task_and_a_setup_of_ones_own_leave_no_secret(
    dag_runner: DagRunner, client: core.Client
) -> None:
    client.secrets.set("BY_HAND", "other")
    bad = {"type": "task", "commands": ["test $A = 1", "exit 1"]}
    ran = dag_runner.run_tasks(
        "create = DstackSecretsOperator(task_id='set', secrets={'A': '{{ conn.hub.password }}'})\n"
        f"bad = DstackRunOperator(task_id='bad', configuration={bad!r}, env={{'A': create.output['A']}},\n"
        "                        poll_interval=0.2)\n"
        "delete = DstackDeleteSecretsOperator(task_id='delete', secrets_of=create)\n"
        "create >> bad >> delete.as_teardown(setups=create)\n",
        HEAD,
    )
    assert (ran.tasks["bad"], ran.tasks["delete"]) == ("failed", "success")
    assert names(client) == ["BY_HAND"]


def test_a_retry_sets_the_same_names_and_each_dag_run_and_index_has_its_own(client: core.Client) -> None:
    first = setting().execute(context_of())
    assert setting().execute(context_of()) == first
    others = [context_of(3), context_of(run_id="r2"), context_of(task_id="set2")]
    assert all(setting().execute(other) != first for other in others)
    assert len(names(client)) == 4
    owner = owner_of_secret(first["HF_TOKEN"][len("${{ secrets.") : -len(" }}")])
    assert owner is not None
    assert (owner.dag_id, owner.run_id) == ("etl", "r")
    assert len(deleting().execute(context_of())) == 1
    assert deleting().execute(context_of()) == []
    assert len(deleting().execute(context_of(3))) == 1
    assert len(names(client)) == 2


def test_the_teardown_of_a_cleared_dag_run_deletes_what_the_setup_returned(client: core.Client) -> None:
    client.secrets.set("MINE", "other")
    returned = setting().execute(context_of())
    cleared = context_of(started=None)
    assert deleting().execute(cleared) == []
    cleared["ti"].pulled = [returned, {"A": "${{ secrets.MINE }}"}]
    assert len(deleting().execute(cleared)) == 1
    assert names(client) == ["MINE"]


def test_the_teardown_of_a_mapped_group_leaves_the_secrets_of_other_indexes(client: core.Client) -> None:
    pulled = [setting().execute(context_of(index)) for index in (0, 1)]
    first, second = (one["HF_TOKEN"][len("${{ secrets.") : -len(" }}")] for one in pulled)
    context = context_of(0, task_id="delete")
    context["ti"].pulled = pulled
    assert deleting().execute(context) == [first]
    assert names(client) == [second]


def test_the_teardown_of_a_task_that_the_dag_lacks_is_an_error() -> None:
    context = context_of(task_id="delete")
    context["dag"] = SimpleNamespace(dag_id="etl", task_ids=["sett", "delete"])
    with pytest.raises(AirflowFailException, match="secrets_of: expected a task of DAG etl, got 'set'"):
        deleting().execute(context)


def test_secrets_that_are_kept_have_their_names_and_replace_none(client: core.Client) -> None:
    assert setting(keep=True).execute(context_of()) == {"HF_TOKEN": "${{ secrets.HF_TOKEN }}"}
    taken = setting({**SECRETS, "OTHER": TEMPLATE}, keep=True)
    with pytest.raises(AirflowFailException, match=r"free in project main, got HF_TOKEN. Set overwrite=True"):
        taken.execute(context_of())
    taken.on_kill()
    assert deleting().execute(context_of()) == []
    assert names(client) == ["HF_TOKEN"]
    setting(keep=True, overwrite=True).execute(context_of())


@pytest.mark.parametrize("keep", [False, True])
def test_a_setup_that_fails_deletes_what_it_has_set(
    client: core.Client, monkeypatch: pytest.MonkeyPatch, *, keep: bool
) -> None:
    monkeypatch.setenv("AIRFLOW_VAR_LONG", "x" * 5001)
    with pytest.raises(AirflowFailException, match="must not exceed 5000"):
        setting({"A": TEMPLATE, "B": "{{ var.value.long }}"}, keep=keep).execute(context_of())
    assert names(client) == []


def test_a_task_that_is_killed_deletes_what_it_has_set(server: LocalServer, client: core.Client) -> None:
    task = setting({"A": TEMPLATE, "B": TEMPLATE})
    server.faults.add("/secrets/create_or_update", delay=1.0)
    timer = threading.Timer(0.5, task.on_kill)
    timer.start()
    with pytest.raises(DstackRunInterrupted, match="ended before its project secrets were set"):
        task.execute(context_of())
    timer.join()
    assert names(client) == []


def test_a_lost_reply_and_a_server_that_is_away(server: LocalServer, client: core.Client) -> None:
    server.faults.add("/secrets/create_or_update", drop="after")
    setting().execute(context_of())
    assert len(names(client)) == 1
    server.faults.add("/secrets/create_or_update", times=None, status=503)
    task = DstackSecretsOperator(task_id="set", secrets=SECRETS, retry_budget=0.0)
    with pytest.raises(DstackServerUnreachable):
        task.execute(context_of())


def test_a_server_without_secrets_is_one_clear_error(
    server: LocalServer, client: core.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise core.UnsupportedServerError("project secrets need dstack >= 0.19.17")

    for method in ("set", "list", "delete"):
        monkeypatch.setattr(f"dstack_core.resource_collections.SecretCollection.{method}", refuse)
    with pytest.raises(AirflowFailException, match=r"need dstack >= 0\.19\.17"):
        setting().execute(context_of())
    assert reap_secrets(client, lambda task: None, dry_run=False, stop_unknown=True, log=LOG) == []


@pytest.mark.parametrize(
    ("template", "value"),
    [
        (TEMPLATE, VALUE),
        ("{{ conn.hub.password }}", "pw_0123456789"),
        ("{{ conn['hub'].extra_dejson.api.key }}", "key_0123456789"),
        ("{{ var.json.team.token | upper }}", "TEAM_0123456789"),
        ("{{ var.value.get('none', 'other') }}", "other"),
        ("{{ var.json.team | tojson }}", '{"empty": "", "token": "team_0123456789"}'),
        ("{{ var.json.team.token | length }}", "15"),
        ("https://me:{{ conn.get('hub').password | urlencode }}@hub", "https://me:pw_0123456789@hub"),
    ],
)
def test_what_a_template_reads(template: str, value: str) -> None:
    assert read_sources({"A": template}) == {"A": value}


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ var.value.none }}", "got none: Airflow has no variable 'none'"),
        ("{{ conn.none.password }}", "got none: Airflow has no connection 'none'"),
        ("{{ conn.hub.login }}", "expected a text for A, got an empty one"),
        ("{{ var.json.team.empty }}", "expected a text for A, got an empty one"),
        (
            "{{ conn.hub.extra_dejson.none }}",
            r"names what exists for A, got an undefined field or key: 'dict object' has no attribute 'none'\. C",
        ),
        ("{{ params.token }}", "reads conn or var for A, got params"),
        ("{{ 'hf_literal' }}", "reads conn or var for A, got another text"),
        (
            "{{ var.value.hf_token",
            "a Jinja template for A, got another text: unexpected end of template, exp",
        ),
        ("{{ var.value.hf_token | b64 }}", r"for A, got another text: No filter named 'b64'\. Correct"),
        ("{{ hf_literal hf_literal }}", "'end of print statement', got another word. Correct"),
        (
            "{{ var.value.hf_token + 1 }}",
            r"for A, got TypeError: can only concatenate str \(not \"int\"\) to",
        ),
        (
            "{{ var.value.hf_token.__class__ }}",
            "for A, got SecurityError: access to attribute '__class__' of",
        ),
        ("{{ var.json.hf_token }}", r"expected a variable that is JSON for A, got one that is not \(Expect"),
        ("{{ conn.hub }}", r"one field for A, got the whole connection 'hub', such .* Name a field"),
        ("https://{{ conn.get('hub') }}", "one field for A, got the whole connection 'hub'"),
        (
            "{{ var.json.team }}",
            r"one field for A, got a whole dict, such as .*token }}\. Name a field of it",
        ),
        ("{{ conn.hub.extra_dejson.api }}", "one field for A, got a whole dict"),
        ("{{ var.json.team.values() | list }}", "one field for A, got a whole list"),
    ],
)
def test_a_template_that_is_wrong_is_reported_without_a_value(template: str, error: str) -> None:
    with pytest.raises(AirflowFailException, match=error) as caught:
        read_sources({"A": template})
    assert VALUE not in repr(caught.value)
    assert "hf_literal" not in repr(caught.value)
    assert not re.search("(key|pw|team)_0123456789", repr(caught.value))
    assert caught.value.__suppress_context__


def test_an_airflow_that_does_not_answer_is_worth_a_retry(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(VALUE)

    monkeypatch.setattr("airflow.sdk.Variable.get", broken)
    with pytest.raises(DstackError, match=r"expected Airflow's answer for HF_TOKEN, got OSError") as caught:
        read_sources(SECRETS)
    assert VALUE not in str(caught.value)
    assert values_to_mask(SECRETS, LOG) == []
    assert "cannot be masked" in caplog.text
    assert VALUE not in caplog.text


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: setting({"HF_TOKEN": VALUE}), "template that reads .* for HF_TOKEN.*, got another text"),
        (lambda: setting({"HF-TOKEN": TEMPLATE}), "expected a name of 1 to 100 letters.*, got 'HF-TOKEN'"),
        (lambda: setting({"A": None}), "got NoneType"),
        (lambda: setting("{{ x }}"), "expected a dict of names and templates.*, got str"),
        (lambda: DstackSecretsOperator(task_id="set", secrets={}), "got an empty dict"),
        (lambda: setting(overwrite=True), "overwrite: expected keep=True with it"),
        (lambda: dstack_secrets(SECRETS, keep=True), "got keep=True. Use a DstackSecretsOperator"),
    ],
)
def test_wrong_arguments_are_reported_when_the_dag_is_parsed(make: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error) as caught:
        make()
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize("run_id", ["manual__2026-11-26T10:00:00.5+00:00", "Zm_Z_~ é", "airflow_1"])
def test_a_name_holds_the_ids_of_its_dag_run(run_id: str) -> None:
    context = context_of(run_id=run_id)
    context["ti"].dag_id = "my.Zoo-dag_1"
    name = secret_names_of(context, ["A_Z_1"])["A_Z_1"]
    assert name.isascii()
    assert name.isidentifier()
    owner = owner_of_secret(name)
    assert owner is not None
    assert (owner.dag_id, owner.run_id) == ("my.Zoo-dag_1", run_id)


def test_a_name_that_is_too_long_is_refused() -> None:
    context = context_of(run_id="r" * 155)
    with pytest.raises(AirflowFailException, match=r"at most 200 characters for HF_TOKEN_OF_THE_TEAM, got"):
        secret_names_of(context, ["HF_TOKEN_OF_THE_TEAM"])


@pytest.mark.parametrize("name", ["HF_TOKEN", "airflow_etl", "prefect_f_" + "0" * 32 + "_0_A"])
def test_other_names_have_no_owner(name: str) -> None:
    assert owner_of_secret(name) is None


@pytest.mark.parametrize(
    ("state", "started", "options", "action"),
    [
        ("success", STARTED, {}, "deleted"),
        ("failed", STARTED, {"dry_run": True}, "would delete"),
        ("running", STARTED, {}, "left"),
        ("failed", None, {}, "left"),
        (None, STARTED, {}, "left"),
        (None, STARTED, {"stop_unknown": True}, "deleted"),
    ],
)
def test_the_reaper_deletes_the_secrets_of_dag_runs_that_have_ended(
    client: core.Client, state: str | None, started: Any, options: dict[str, bool], action: str
) -> None:
    client.secrets.set("BY_HAND", "other")
    setting().execute(context_of())
    facts = None if state is None else TaskFacts("success", None, state, started)
    how: dict[str, Any] = {"dry_run": False, "stop_unknown": False, **options}
    (found,) = reap_resources(client, lambda task: facts, **how, log=LOG)
    assert (getattr(found, "dag_run", None), found.action) == ("etl/r", action)
    assert len(names(client)) == (1 if action == "deleted" else 2)


def test_the_reaper_reports_what_it_could_not_delete(server: LocalServer, client: core.Client) -> None:
    setting().execute(context_of())
    facts = TaskFacts("success", None, "failed", STARTED)
    how: dict[str, Any] = {"dry_run": False, "stop_unknown": False, "log": LOG}
    server.faults.add("/secrets/delete", status=403)
    found = reap_resources(client, lambda task: facts, **how)
    assert [one.action for one in found] == ["not deleted"]
    (message,) = resource_failures(found)
    assert "Delete these project secrets: airflow_etlZ_rZ_" in message

    def broken(task: Any) -> Any:
        raise OSError("database is away")

    with pytest.raises(DstackError, match=r"database is away\. No secret was deleted"):
        reap_secrets(client, broken, **how)


def test_a_trigger_gets_templates_and_masks_their_values(server: LocalServer, client: core.Client) -> None:
    assert DstackRunOperator(task_id="train", configuration=PRINTS).synced_sources is None
    trigger = DstackRunTrigger(
        dstack_conn_id="dstack_default",
        project_name=None,
        run_name="r",
        marker="m",
        progress={},
        synced_sources=SECRETS,
    )
    _, arguments = trigger.serialize()
    assert arguments["synced_sources"] == SECRETS
    assert VALUE not in json.dumps(arguments)
    DstackRunTrigger(**arguments)._prepare()
    trigger._prepare()
    assert VALUE in trigger._hidden
