"""What a task hands over to the triggerer, and when."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import _from_operator, _trigger_relay, operators
from airflow_provider_dstack._names import TaskNames
from airflow_provider_dstack.errors import DstackRunInterrupted
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.support import over, paths, runs_of
from tests.provider_airflow.test_operator import CONTEXT, TI
from tests.provider_airflow.versions import TaskDeferred


@pytest.fixture(autouse=True)
def early_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)


def deferrable(*commands: str, **arguments: Any) -> DstackRunOperator:
    given = {"type": "task", "commands": list(commands), **arguments.pop("more", {})}
    return DstackRunOperator(
        task_id="train", configuration=given, deferrable=True, poll_interval=0.1, **arguments
    )


def deferred(task: DstackRunOperator, context: Any = CONTEXT) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as caught:
        task.execute(context)
    return caught.value


@pytest.mark.parametrize("seconds_ago", [20, 0], ids=["slow start", "after a clear"])
def test_execution_timeout_counts_from_the_start_of_this_try(server: LocalServer, seconds_ago: int) -> None:
    started = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    # Airflow gives a cleared or retried task another start, and a resumed one the same.
    context: Any = {"ti": SimpleNamespace(**vars(TI) | {"start_date": started})}
    caught = deferred(deferrable("sleep 60", execution_timeout=timedelta(seconds=900)), context)
    deadline = started.timestamp() + 900
    assert caught.trigger.deadline == deadline
    assert caught.timeout is not None
    # Airflow's own limit comes later: it would stop no run.
    backstop = datetime.now(UTC).timestamp() + caught.timeout.total_seconds()
    assert 30 < backstop - deadline < 300


def test_without_execution_timeout_there_is_no_deadline(server: LocalServer) -> None:
    caught = deferred(deferrable("sleep 60"))
    assert (caught.timeout, caught.trigger.deadline) == (None, None)


@pytest.mark.usefixtures("ended_by_a_user")
@pytest.mark.parametrize("how", ["state", "signal"])
def test_a_task_that_ends_while_it_is_handed_over_stops_its_run(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    task = deferrable("sleep 600")

    def save(*told: object) -> None:
        # A user ends the task after its last check for that, and before the request to defer.
        if how == "state":
            monkeypatch.setattr(_from_operator, "was_ended", lambda ti: True)
        else:
            task.on_kill()

    monkeypatch.setattr(_trigger_relay, "save", save)
    with pytest.raises(DstackRunInterrupted, match="The task was ended before its run"):
        task.execute(CONTEXT)
    (run,) = runs_of(server, f"airflow:{TI.dag_id}/")
    assert over(run).raw_status == "terminated"
    assert len(paths(server, "/runs/stop")) == 1


def test_no_secret_is_left_to_the_triggerer_or_in_an_xcom(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(_trigger_relay, "save", lambda *given: saved.append(given[1:]))
    key = "first line of the key\nand its second line"
    more = {
        "image": "registry.example.com/train",
        "registry_auth": {"username": "robot", "password": "docker-pass-1"},
        "env": {"WORD_TOKEN": "open-sesame-77", "KEY": key, "STEPS": "100000"},
    }
    command = f'echo "$WORD_TOKEN $STEPS"; echo "$KEY"; echo docker-pass-1; echo {server.token}; sleep 60'
    caught = deferred(deferrable(command, more=more))
    told = json.dumps([caught.trigger.serialize()[1], saved])
    assert "*** 100000" in told
    for secret in ("open-sesame-77", "line of the key", "second line", "docker-pass-1", server.token):
        assert secret not in told


def test_the_trigger_gets_names_and_no_values(server: LocalServer) -> None:
    env = {"WORD": "{{ conn.hub.password }}", "STAGE": "train", "API_KEY": "literal-66", "LICENSE": "free"}
    task = deferrable("echo $STAGE $WORD $API_KEY; sleep 60", more={"env": env})
    task.mask_env = ["LICENSE"]
    connection: Any = SimpleNamespace(password="hub-pass-77")
    context: Any = {"conn": {"hub": connection}}
    task.render_template_fields(context)
    arguments = deferred(task).trigger.serialize()[1]
    assert (arguments["mask_env"], arguments["secret_names"]) == (["LICENSE"], ["WORD"])
    assert arguments["tail"] == ["train *** ***"]
    assert not [word for word in ("hub-pass-77", "literal-66") if word in json.dumps(arguments)]


def test_a_result_is_stored_without_secrets_before_the_run_has_ended(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(_trigger_relay, "save", lambda *given: saved.append(given[1:]))
    result = json.dumps({"kind": "result", "value": {"word": "open-sesame-77", "kept": 1}})
    command = f"echo '::dstack::{result}'; echo one; sleep 60"
    task = deferrable(command, more={"env": {"WORD_TOKEN": "open-sesame-77"}})
    arguments = deferred(task).trigger.serialize()[1]
    for stored in (arguments, saved[-1][-1]):
        assert stored["progress"]["reported"]["results"] == [{"word": "***", "kept": 1}]
        assert stored["reported"]["has_secrets"]


def test_what_the_triggerer_needs_is_in_the_triggers_arguments(server: LocalServer) -> None:
    # On resume there is another operator, in another process.
    task = deferrable("echo one; sleep 60", get_logs=True, on_kill_action="abort", log_budget_bytes=7)
    path, arguments = deferred(task).trigger.serialize()
    assert path == "airflow_provider_dstack.triggers.DstackRunTrigger"
    assert json.loads(json.dumps(arguments)) == arguments
    run = TaskNames.of(CONTEXT).run
    assert (arguments["run_name"], arguments["marker"]) == (run.name, run.marker)
    assert (arguments["on_kill_action"], arguments["log_budget_bytes"]) == ("abort", 7)
    assert (arguments["tail"], arguments["relayed_bytes"]) == (["one"], 4)
