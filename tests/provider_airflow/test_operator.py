"""The operator's arguments, its serialization, and the ends of a deferral."""

from __future__ import annotations

import copy
import json
import socket
from dataclasses import asdict
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG
from airflow.sdk.definitions.mappedoperator import OperatorPartial

from airflow_provider_dstack import operators
from airflow_provider_dstack._compat import AirflowFailException, AirflowTaskTimeout, deferral_errors
from airflow_provider_dstack._names import TaskNames
from airflow_provider_dstack._parameters import secrets_in
from airflow_provider_dstack._previous_try import RECORD_KEY, Record
from airflow_provider_dstack._task_run import TaskRun
from airflow_provider_dstack.errors import DstackRunFailed, DstackRunInterrupted, DstackServerUnreachable
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import GPU, Resources, RetryPolicy, Task
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for
from tests.provider_airflow.test_outcome import FAILED
from tests.provider_airflow.test_relay import OUTCOME
from tests.provider_airflow.versions import DagSerialization

TI = SimpleNamespace(dag_id="d", run_id="r", task_id="train", try_number=1, max_tries=0, map_index=-1, id="1")
CONTEXT: Any = {"ti": TI}
RUN = TaskNames.of(CONTEXT).run
SWITCHES = (
    *("verify_ports", "deferrable", "get_logs", "local_repo", "durable", "reports", "log_groups"),
    "relay_log_again",
)


def operator(**arguments: Any) -> DstackRunOperator:
    values = {"task_id": "train", "configuration": {"type": "task", "commands": ["true"]}, **arguments}
    return DstackRunOperator(**values)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"on_kill_action": "explode"},
            "on_kill_action: expected one of 'stop', 'abort', 'keep', got 'explode'",
        ),
        ({"poll_interval": 0}, "poll_interval: expected 0.1 seconds or more, got 0"),
        ({"poll_interval": "5"}, "poll_interval: expected 0.1 seconds or more, got '5'"),
        ({"retry_budget": -1}, "retry_budget: expected 0 seconds or more, got -1"),
        ({"log_budget_bytes": -1}, r"^log_budget_bytes: expected bytes .* or None for all of it, got -1\.$"),
        ({"log_budget_bytes": "10"}, "log_budget_bytes: expected bytes of log, 0 or more, .* got '10'"),
        ({"log_budget_bytes": 1.5}, "log_budget_bytes: expected bytes of log, 0 or more, .* got 1.5"),
        ({"log_budget_bytes": True}, "log_budget_bytes: expected bytes of log, 0 or more, .* got True"),
        ({"skip_on_exit_code": "99"}, "skip_on_exit_code: expected an exit status .*, got '99'"),
        ({"skip_on_exit_code": [1, 256]}, "an exit status from 0 to 255, or a list of such, got .*256"),
        ({"skip_on_exit_code": True}, "skip_on_exit_code: expected an exit status .*, got True"),
        (
            {"resources": Resources(gpu=GPU(count=1))},
            "resources: expected Airflow's own .* Pass it as run_resources",
        ),
        ({"resources": "24GB.."}, "resources: expected Airflow's own .* Pass it as run_resources"),
        ({"resources": 1}, "resources: expected Airflow's own .* Pass it as run_resources"),
        (
            {"retry_policy": RetryPolicy(retry=True)},
            "retry_policy: expected Airflow's own .* Pass it as run_retry_policy",
        ),
        ({"log_timestamps": "yes"}, "log_timestamps: expected True or False, got 'yes'"),
        ({"log_timestamps": "{{ params.x }}"}, "log_timestamps: expected True or False"),
        ({"log_groups": 1}, "log_groups: expected True or False, got 1"),
        *(({name: "False"}, f"{name}: expected True or False, got 'False'") for name in SWITCHES),
        ({"tags": True}, 'tags: expected a dict such as {"team": "ml"}, got True'),
        ({"tags": ["team"]}, "tags: expected a dict"),
        ({"tags": "team"}, "tags: expected a dict"),
        ({"tags": {"te am": "x", "x": "{{ ds }}"}}, "tags: expected a key of .*, got 'te am'"),
        ({"tags": {"team": 1}}, "tags: expected a value .* for team, got 1"),
        ({"tags": {"team": None}}, "tags: expected a value .* for team, got None"),
        *(
            ({"debug_on_failure": given}, f"debug_on_failure: expected seconds above 0.*, got {given!r}")
            for given in ("5x", "", "0", 0, -1, True, 1.5, "1.5h", "-5m", "1000d", "169h", 604801, "8d")
        ),
        *(
            ({"debug_on_failure": given}, "debug_on_failure: expected seconds above 0")
            for given in ([1], (1,), {"seconds": 1}, {1}, b"5m", timedelta(minutes=5))
        ),
    ],
)
def test_wrong_arguments_are_reported_when_the_dag_is_parsed(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        operator(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"tags": tags} for tags in (None, False, {}, {"team": "ml"}, {"site": "a b:c/d@e"}, "{{ x }}")),
        *({"tags": {key: one}} for key, one in (("team", "{{ x }}"), ("{{ x }}", "y z"))),
        *(
            {"debug_on_failure": given}
            for given in (None, False, 90, "90", "30m", "2h", "7d", "168h", "{{ x }}")
        ),
    ],
    ids=str,
)
def test_what_may_be_right_passes_when_the_dag_is_parsed(arguments: dict[str, Any]) -> None:
    assert operator(**arguments).task_id == "train"


@pytest.mark.parametrize("name", ["tags", "debug_on_failure"])
def test_the_output_of_another_task_passes_when_the_dag_is_parsed(name: str) -> None:
    with DAG("literals", schedule=None):
        choose = EmptyOperator(task_id="choose")
        assert operator(**{name: choose.output}).upstream_task_ids == {"choose"}
        team = operator(task_id="other", tags={"team": choose.output, "x": "y"})
        assert team.upstream_task_ids == {"choose"}


def test_a_dag_with_models_survives_serialization() -> None:
    with DAG("serialized", schedule=None) as dag:
        operator(
            configuration=Task(commands=["train {{ ds }}"], env={"HF_KEY": "hunter2-hunter2"}),
            run_resources=Resources(gpu=GPU(name="A100", memory="40GB")),
            run_retry_policy=RetryPolicy(retry=True, limit="1h"),
        )
    text = json.dumps(DagSerialization.to_dict(dag))
    again = DagSerialization.from_dict(json.loads(text))
    assert again.get_task("train").task_type == "DstackRunOperator"
    assert "hunter2" not in text
    assert json.dumps(DagSerialization.to_dict(dag)) == text


def test_a_copied_operator_keeps_its_models() -> None:
    configuration = Task(commands=["true"])
    copied = copy.deepcopy(operator(configuration=configuration))
    assert copied.configuration == configuration


def test_an_operator_can_be_mapped() -> None:
    partial = DstackRunOperator.partial(task_id="train", poll_interval=1.0)
    assert isinstance(partial, OperatorPartial)
    with DAG("mapped", schedule=None):
        partial.expand(configuration=[{"type": "task", "commands": ["true"]}])


def test_templates_inside_models_are_rendered_and_checked() -> None:
    with DAG("rendered", schedule=None):
        task = operator(
            configuration=Task(commands=["echo {{ word }}"], env={"A": "{{ word }}"}),
            run_resources=Resources(gpu=GPU(name="{{ word }}")),
        )
    context: Any = {"word": "hi"}
    task.render_template_fields(context)
    assert task.configuration == Task(commands=["echo hi"], env={"A": "hi"})
    assert task.run_resources == Resources(gpu=GPU(name="hi"))


def test_secrets_are_found_in_every_form_of_a_configuration() -> None:
    env = {"KEY": "swordfish", "STEPS": "100000", "FLAG": "false", "SHORT": "abc"}
    forms: list[Any] = [
        Task(commands=["x"], env=env),
        {"type": "task", "commands": ["x"], "env": env},
        {"type": "task", "commands": ["x"], "env": [f"{name}={value}" for name, value in env.items()]},
        f"type: task\ncommands: [x]\nenv: {json.dumps(env)}\n",
    ]
    for form in forms:
        assert list(secrets_in(form)) == ["swordfish"]
    registry = {"type": "task", "image": "i", "registry_auth": {"username": "u", "password": "docker-pass"}}
    assert list(secrets_in(registry)) == ["docker-pass"]
    assert list(secrets_in({"type": "dance"})) == []


def left_behind(server: LocalServer) -> Any:
    """Submit the run that the task of ``TI`` would have."""
    return server.client().runs.submit(
        {"type": "task", "commands": ["sleep 600"]},
        run_name=RUN.name,
        marker=RUN.marker,
    )


def test_a_finished_event_is_the_result_or_the_error() -> None:
    task = operator()
    event = {"kind": "finished", "outcome": OUTCOME.to_dict(), "tail": []}
    assert task.execute_complete(CONTEXT, event) == OUTCOME.to_dict()
    with pytest.raises(DstackRunFailed, match="status 7"):
        task.execute_complete(CONTEXT, {**event, "outcome": FAILED.to_dict()})


def test_a_broken_watch_stops_the_run(server: LocalServer) -> None:
    run = left_behind(server)
    event = {"kind": "broken", "error": "DstackServerUnreachable", "message": "no answer"}
    with pytest.raises(DstackServerUnreachable, match="no answer"):
        operator().execute_complete(CONTEXT, event)
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_a_timeout_whose_stop_failed_stops_the_run_again(server: LocalServer) -> None:
    run = left_behind(server)
    with pytest.raises(AirflowTaskTimeout):
        operator().execute_complete(CONTEXT, {"kind": "timed_out", "stopped": False})
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_a_deferral_that_failed_stops_the_run(server: LocalServer) -> None:
    run = left_behind(server)
    with pytest.raises(deferral_errors()):
        operator().resume_execution("__fail__", {"error": "Trigger failure"}, CONTEXT)
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


class Store(dict[str, Any]):
    """A store of values like Airflow's task state store."""

    set = dict.__setitem__
    delete = dict.__delitem__


def with_a_try_left(**more: Any) -> Any:
    return {"ti": SimpleNamespace(**{**vars(TI), "max_tries": 1}), **more}


def taken_over(server: LocalServer) -> tuple[Any, Any]:
    """Submit a run that this try took over from an earlier one; return it and the context."""
    run = server.client().runs.submit(
        {"type": "task", "commands": ["sleep 600"]}, run_name="af-earlier", marker="earlier"
    )
    record = Record("af-earlier", "earlier", "main", 1, 0)
    return run, {**CONTEXT, "task_state_store": Store({RECORD_KEY: asdict(record)})}


def test_the_run_that_was_taken_over_is_stopped(server: LocalServer) -> None:
    run, context = taken_over(server)
    with pytest.raises(deferral_errors()):
        operator().resume_execution("__fail__", {"error": "Trigger failure"}, context)
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_a_deferred_run_that_succeeded_leaves_no_record(server: LocalServer) -> None:
    _, context = taken_over(server)
    event = {"kind": "finished", "outcome": OUTCOME.to_dict(), "tail": []}
    operator().execute_complete(context, event)
    assert context["task_state_store"] == {}


def test_a_watch_that_broke_leaves_the_run_to_the_next_try(server: LocalServer) -> None:
    left_behind(server)
    event = {"kind": "broken", "error": "DstackServerUnreachable", "message": "no answer"}
    with pytest.raises(DstackServerUnreachable):
        operator().execute_complete(with_a_try_left(), event)
    with pytest.raises(deferral_errors()):
        operator().resume_execution("__fail__", {"error": "Trigger failure"}, with_a_try_left())
    assert paths(server, "/runs/stop") == []


@pytest.mark.parametrize("arguments", [{"durable": False}, {}], ids=["not durable", "refused"])
def test_a_watch_that_broke_stops_a_run_that_no_next_try_takes_over(
    server: LocalServer, arguments: dict[str, Any]
) -> None:
    run = server.client().runs.submit(
        {"type": "task", "commands": ["sleep 600"]},
        run_name=RUN.name,
        marker=TaskNames.of(with_a_try_left()).run.marker,
    )
    error = "DstackServerUnreachable" if arguments else "AirflowFailException"
    with pytest.raises((DstackServerUnreachable, AirflowFailException)):
        operator(**arguments).execute_complete(
            with_a_try_left(), {"kind": "broken", "error": error, "message": "told"}
        )
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_execution_timeout_stops_the_run_even_with_a_try_left(server: LocalServer) -> None:
    context = with_a_try_left()
    run = server.client().runs.submit(
        {"type": "task", "commands": ["sleep 600"]},
        run_name=RUN.name,
        marker=TaskNames.of(context).run.marker,
    )
    with pytest.raises(deferral_errors()):
        operator().resume_execution("__fail__", {"error": "Trigger timeout"}, context)
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_a_kept_run_is_left_alone_after_a_failed_deferral(server: LocalServer) -> None:
    left_behind(server)
    with pytest.raises(deferral_errors()):
        operator(on_kill_action="keep").resume_execution("__fail__", {"error": "x"}, CONTEXT)
    assert paths(server, "/runs/stop") == []


@pytest.mark.usefixtures("ended_by_a_user")
def test_a_kill_between_hand_over_and_deferral_stops_the_run(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = operator(configuration={"type": "task", "commands": ["sleep 600"]}, deferrable=True)
    follow = TaskRun.follow

    def follow_then_kill(task_run: TaskRun) -> None:
        follow(task_run)
        task.on_kill()

    monkeypatch.setattr(operators, "_SYNC_SECONDS", 0.5)
    monkeypatch.setattr(TaskRun, "follow", follow_then_kill)
    with pytest.raises(DstackRunInterrupted, match=r"The task was ended before its run\. Run .* is stopping"):
        task.execute(CONTEXT)
    run = server.client().runs.get(RUN.name)
    assert run is not None
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)


def test_a_kill_before_execute_submits_nothing(server: LocalServer) -> None:
    task = operator()
    task.on_kill()
    with pytest.raises(DstackRunInterrupted, match="not submitted"):
        task.execute(CONTEXT)
    assert paths(server, "/runs/apply") == []


def test_a_local_port_that_is_taken_on_the_worker_does_not_matter(server: LocalServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        ports = [held.getsockname()[1]]
        task = operator(configuration={"type": "task", "commands": ["true"], "ports": ports})
        assert task.execute(CONTEXT)["status"] == "done"
