"""Fleets of a DAG run: created once, used by its tasks, deleted however they end; others are left alone."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import TaskDeferred

from airflow_provider_dstack._compat import AirflowFailException, TaskFacts
from airflow_provider_dstack._reap_fleets import fleet_failure, reap_fleets
from airflow_provider_dstack._resource_names import ResourceOwner
from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted, DstackServerUnreachable
from airflow_provider_dstack.fleet_trigger import DstackFleetTrigger
from airflow_provider_dstack.fleets import DstackDeleteFleetOperator, DstackFleetOperator, dstack_fleet
from dstack_core import Client, FleetConfiguration
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, connection_json, paths, wait_for
from tests.provider_airflow.tries import STARTED
from tests.provider_airflow.versions import DagBag

RUN = "DstackRunOperator(task_id={!r}, configuration={!r}, poll_interval=0.2)"
TWO = {"nodes": "0..2", "idle_duration": "10m"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    with LocalServer(stop_grace_seconds=2.0, needs_fleet=True, instance_seconds=0.05) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


class Ti(SimpleNamespace):
    """A task instance that keeps its XComs."""

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value

    def xcom_pull(self, task_ids: Any = None, key: str = "return_value", **options: Any) -> Any:
        return self.pushed.get(key)


def context_of(map_index: int = -1, task_id: str = "create") -> Any:
    ti = Ti(
        dag_id="etl", run_id="r", task_id=task_id, try_number=1, max_tries=0, map_index=map_index, pushed={}
    )
    return {"ti": ti, "dag_run": SimpleNamespace(start_date=STARTED)}


def create(configuration: Any = None, **options: Any) -> DstackFleetOperator:
    given = {"poll_interval": 0.1, "retry_budget": 5.0, **options}
    return DstackFleetOperator(task_id="create", configuration=configuration or TWO, **given)


def in_dag(make: Any) -> Any:
    with DAG("etl"):
        return make()


def delete(**options: Any) -> DstackDeleteFleetOperator:
    return DstackDeleteFleetOperator(
        task_id="delete", retry_budget=5.0, **(options or {"fleet_of": "create"})
    )


def fleets_of(server: LocalServer) -> list[str]:
    named = [run.configuration["fleets"] for run in server.runs]
    return [one if isinstance(one, str) else one["name"] for (one,) in named]


def test_the_tasks_of_a_group_share_the_machines_of_its_fleet(
    dag_runner: DagRunner, server: LocalServer, client: Client
) -> None:
    task = {"type": "task", "commands": ["true"]}
    ran = dag_runner.run_tasks(
        f"with dstack_fleet('gpus', {TWO!r}) as fleet:\n"
        f"    first = {RUN.format('first', task)}\n"
        f"    second = {RUN.format('second', task)}\n"
        "    first >> second\n"
        "@task\n"
        "def after(name):\n"
        "    return name\n"
        "fleet >> after(fleet.name)\n"
    )
    assert ran.tasks == {
        "gpus.create_fleet": "success",
        "gpus.first": "success",
        "gpus.second": "success",
        "gpus.delete_fleet": "success",
        "after": "success",
    }
    name = ran.values["gpus.create_fleet"]
    assert name.startswith(ran.dag_id.replace("_", "-"))
    assert ran.values["after"] == name
    assert fleets_of(server) == [name, name]
    assert ran.values["gpus.delete_fleet"] == {name: "deleted"}
    assert client.fleets.list() == []


def test_a_task_whose_group_has_no_fleet_submits_nothing(dag_runner: DagRunner, server: LocalServer) -> None:
    """As after a setup that was marked success."""
    task = {"type": "task", "commands": ["true"]}
    ran = dag_runner.run_tasks(
        f"with dstack_fleet('gpus', {TWO!r}) as fleet:\n"
        f"    {RUN.format('train', task)}\n"
        "fleet.create.execute = lambda context: None\n"
    )
    assert ran.tasks["gpus.train"] == "failed"
    assert server.runs == []


def test_a_retry_finds_the_fleet_and_a_lost_reply_makes_no_second(
    server: LocalServer, client: Client
) -> None:
    context = context_of()
    server.faults.add("/fleets/apply", drop="after")
    name = create().execute(context)
    assert context["ti"].pushed == {"dstack_fleet_name": name}
    (first,) = client.fleets.list()
    assert create({**TWO, "nodes": "0..3"}).execute(context_of()) == name
    (second,) = client.fleets.list()
    assert (second.id, second.name) == (first.id, name)
    assert delete().execute(context_of(task_id="delete")) == {name: "deleted"}
    assert delete().execute(context_of(task_id="delete")) == {}
    assert delete(name=[name, "None", ""]).execute(context_of(task_id="delete")) == {name: "gone"}


def test_each_dag_run_and_each_index_has_a_fleet_of_its_own(client: Client) -> None:
    other = context_of()
    other["ti"].run_id = "r2"
    names = [create().execute(context) for context in (context_of(), context_of(3), other)]
    assert len(set(names)) == 3
    assert create(name="gpus").execute(context_of(3)) == "gpus-3"
    assert delete().execute(context_of(3, "delete")) == {names[1]: "deleted", "gpus-3": "deleted"}
    assert names[2] in [fleet.name for fleet in client.fleets.list()]


def test_a_fleet_of_another_owner_is_left_alone(client: Client) -> None:
    client.fleets.apply(TWO, name="gpus")
    with pytest.raises(AirflowFailException, match="a fleet without a marker has it in project main"):
        create(name="gpus").execute(context_of())
    with pytest.raises(AirflowFailException, match="got 'gpus', which no task of Airflow created"):
        delete(name="gpus").execute(context_of())
    assert [fleet.name for fleet in client.fleets.list()] == ["gpus"]


def test_machines_are_waited_for_in_the_worker(client: Client) -> None:
    name = create({"nodes": 2}).execute(context_of())
    fleet = client.fleets.get(name)
    assert fleet is not None
    assert [machine.status for machine in fleet.instances] == ["idle", "idle"]


def test_a_fleet_whose_machines_do_not_come_is_deleted(client: Client) -> None:
    with pytest.raises(DstackError, match=r"within 1 s, got fewer. .* has 0 of 1 .*no_offers"):
        create({"nodes": 1, "max_price": 0.01}, wait_timeout=1).execute(context_of())
    client.fleets.delete("none", until="deleted")
    assert all(fleet.is_terminating for fleet in client.fleets.list())


def test_a_task_that_is_killed_deletes_its_fleet(client: Client) -> None:
    task = create({"nodes": 1, "max_price": 0.01}, poll_interval=60)
    timer = threading.Timer(0.7, task.on_kill)
    timer.start()
    with pytest.raises(DstackRunInterrupted, match="ended before its fleet had its machines"):
        task.execute(context_of())
    timer.join()
    assert all(fleet.is_terminating for fleet in client.fleets.list())


def test_a_killed_task_logs_the_end_of_its_fleet_once(
    client: Client, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill is handled in the task's own thread, in the midst of a wait."""
    task = create({"nodes": 1, "max_price": 0.01}, poll_interval=60)
    wait = task._sleep

    def killed(seconds: float) -> None:
        if seconds:
            task.on_kill()
        wait(seconds)

    monkeypatch.setattr(task, "_sleep", killed)
    with pytest.raises(DstackRunInterrupted):
        task.execute(context_of())
    assert "".join(capfd.readouterr()).count("of this task is deleted") == 1


def test_a_server_that_is_away_is_reported(server: LocalServer) -> None:
    server.faults.add("/fleets/get", times=None, status=503)
    with pytest.raises(DstackServerUnreachable):
        create(retry_budget=0).execute(context_of())


def deferred(task: DstackFleetOperator, context: Any) -> Any:
    with pytest.raises(TaskDeferred) as caught:
        task.execute(context)
    return caught.value.trigger


def fired(trigger: DstackFleetTrigger) -> dict[str, Any]:
    trigger.not_before = 0.0
    path, arguments = trigger.serialize()
    assert path == f"{DstackFleetTrigger.__module__}.{DstackFleetTrigger.__name__}"

    async def first() -> dict[str, Any]:
        async for event in DstackFleetTrigger(**json.loads(json.dumps(arguments))).run():
            payload: dict[str, Any] = event.payload
            return payload
        raise AssertionError("no event")

    return asyncio.run(first())


def test_the_triggerer_waits_for_the_machines(client: Client) -> None:
    task, context = create({"nodes": 1}, deferrable=True), context_of()
    event = fired(deferred(task, context))
    name = context["ti"].pushed["dstack_fleet_name"]
    assert event == {"kind": "ready", "text": f"Fleet {name} has 1 of 1 machines."}
    assert task.execute_complete(context, event) == name


def test_a_deferred_wait_that_fails_deletes_the_fleet(client: Client) -> None:
    task, context = create({"nodes": 1, "max_price": 0.01}, deferrable=True, wait_timeout=1), context_of()
    event = fired(deferred(task, context))
    assert event["kind"] == "timed_out"
    with pytest.raises(DstackError, match="within 1 s, got fewer"):
        task.execute_complete(context, event)
    client.fleets.delete(context["ti"].pushed["dstack_fleet_name"], until="deleted")
    with pytest.raises(DstackError, match="no longer there; something else deleted it"):
        task.execute_complete(context, fired(deferred_again(task, context)))


def deferred_again(task: DstackFleetOperator, context: Any) -> DstackFleetTrigger:
    """Return the trigger of a fleet that is gone."""
    owner = ResourceOwner.of(context, "fleet")
    return DstackFleetTrigger(
        dstack_conn_id="dstack_default",
        project_name=None,
        name=owner.name(None),
        mark=owner.mark,
        machines=1,
        poll_interval=0.1,
        deadline=None,
    )


def test_triggers_that_wait_together_share_their_polls(server: LocalServer, client: Client) -> None:
    create({"nodes": 0}).execute(context_of())
    before = len(paths(server, "/fleets/list"))
    owner = ResourceOwner.of(context_of(), "fleet")

    async def wait_all() -> None:
        triggers = [deferred_again(create(), context_of()) for _ in range(20)]
        for trigger in triggers:
            trigger.machines, trigger.deadline = 1, 1.0
        await asyncio.gather(*(anext(trigger.run()) for trigger in triggers))

    asyncio.run(wait_all())
    assert len(paths(server, "/fleets/list")) - before <= 3
    client.fleets.delete(owner.name(None))


@pytest.mark.parametrize("state", ["failed", "deferred"])
def test_the_fleet_of_a_deferred_task_that_a_user_ended_is_deleted(
    client: Client, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    create().execute(context_of())
    trigger = deferred_again(create(), context_of())
    trigger.task_instance = context_of()["ti"]
    monkeypatch.setattr("airflow_provider_dstack.fleet_trigger.task_state", lambda ti: state)
    asyncio.run(trigger.on_kill())
    assert [fleet.is_terminating for fleet in client.fleets.list()] in ([], [state == "failed"])


def test_the_forms_of_a_configuration(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "fleet.dstack.yml"
    path.write_text("type: fleet\nname: ignored\nnodes: 0..2\n")
    for index, form in enumerate([path, "nodes: 0..1\n", FleetConfiguration(nodes="0..2")]):
        create(form).execute(context_of(index))
    assert len(client.fleets.list()) == 3
    task = create("type: {{ params.kind }}\n")
    task.configuration = "type: task\n"
    with pytest.raises(AirflowFailException, match="configuration: expected `type: fleet`, got 'task'"):
        task.execute(context_of())


def test_a_file_is_checked_when_airflow_reads_it_and_again_when_the_task_runs(tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong.yml", tmp_path / "right.yml"
    wrong.write_text("type: fleet\nnodes: two\n")
    right.write_text("type: fleet\nnodes: {{ params.nodes }}\n")
    (tmp_path / "dag.py").write_text(
        "from airflow.sdk import DAG\n"
        "from airflow_provider_dstack.fleets import DstackFleetOperator\n"
        "for name in ('wrong', 'right'):\n"
        "    with DAG(name, schedule=None) as dag:\n"
        "        DstackFleetOperator(task_id='create', configuration=f'{name}.yml')\n"
        "    globals()[name] = dag\n"
    )
    bag = DagBag(dag_folder=str(tmp_path / "dag.py"), bundle_path=tmp_path)
    (error,) = bag.import_errors.values()
    assert "FleetConfiguration.nodes: expected a number such as 2" in error
    assert list(bag.dags) == ["right"]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: delete(fleet_of="a", name="b"), "expected fleet_of .* or name .*, got both"),
        (lambda: DstackDeleteFleetOperator(task_id="x"), "got neither"),
        (lambda: create(machines=-1), "machines: expected a whole number from 0 on"),
        (lambda: create(wait_timeout=0), "wait_timeout: expected 1 second or more"),
        (lambda: dstack_fleet("gpus"), "expected a configuration, got only the id 'gpus'"),
        (
            lambda: dstack_fleet(TWO, TWO),
            r"expected the group's id \(a str\) before .*, got a dict. Pass one",
        ),
        (lambda: dstack_fleet("a.yml", TWO), r"expected the group's id .*, got 'a.yml'"),
        (lambda: dstack_fleet("a", TWO, group_id="b"), "one id of the group, got 'a' and group_id='b'"),
        (lambda: in_dag(lambda: dstack_fleet({})), "FleetConfiguration: expected nodes .*, got neither"),
        (lambda: create({"nodes": "two"}), r"FleetConfiguration\.nodes: expected a number such as 2"),
        (lambda: create("type: task\n"), "configuration: expected `type: fleet`, got 'task'"),
        (
            lambda: create("gpus"),
            "expected a dict, YAML text or the path of a .yml or .yaml file, got 'gpus'",
        ),
        (lambda: create("a: ["), "configuration: expected YAML, got"),
        (lambda: create(name="My_Fleet"), "name: expected 2 to 41 lower-case letters.*, got 'My_Fleet'"),
        (
            lambda: create({"nodes": "0..2"}, machines=3),
            "machines: expected at most 2, .* nodes, got 3. Wait",
        ),
        (lambda: create(FleetConfiguration(nodes=1), machines=2), "machines: expected at most 1"),
    ],
)
def test_wrong_arguments_are_reported_when_the_dag_is_parsed(make: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: create({"nodes": "{{ params.nodes }}"}),
        lambda: create("nodes: {{ params.nodes }}\n"),
        lambda: create(Path("elsewhere.yml")),
        lambda: create("beside.yml"),
        lambda: create(name="{{ params.name }}"),
        lambda: in_dag(lambda: create({"nodes": DstackFleetOperator(task_id="x", configuration=TWO).output})),
        lambda: create("{% if params.big %}nodes: 2\n{% else %}nodes: 1\n{% endif %}"),
    ],
)
def test_what_is_filled_in_later_is_checked_when_the_task_runs(make: Any) -> None:
    assert make().task_id == "create"


def test_machines_that_the_rendered_nodes_do_not_allow_are_refused_at_once(server: LocalServer) -> None:
    task = create({"nodes": "{{ params.nodes }}"}, machines=3)
    task.configuration = {"nodes": "0..2"}
    with pytest.raises(AirflowFailException, match=r"machines: expected at most 2, .* got 3"):
        task.execute(context_of())
    assert paths(server, "/fleets/apply") == []


def test_a_group_shows_its_id() -> None:
    with DAG("etl"):
        assert repr(dstack_fleet("gpus", TWO)) == "DstackFleetGroup('gpus')"


def test_a_fleet_is_deleted_although_a_task_failed_and_others_name_their_fleet(
    dag_runner: DagRunner, server: LocalServer, client: Client
) -> None:
    client.fleets.apply(TWO, name="own")
    task = {"type": "task", "commands": ["exit 1"]}
    own = {"type": "task", "commands": ["true"], "fleets": ["own"]}
    ran = dag_runner.run_tasks(
        f"with dstack_fleet({TWO!r}, name='shared'):\n"
        f"    {RUN.format('bad', task)}\n"
        f"    {RUN.format('own', own)}\n"
    )
    assert ran.tasks["fleet.bad"] == "failed"
    assert ran.tasks["fleet.delete_fleet"] == "success"
    assert sorted(fleets_of(server)) == ["own", "shared"]
    assert [fleet.name for fleet in client.fleets.list()] == ["own"]


@pytest.mark.parametrize(
    ("state", "started", "options", "action"),
    [
        ("success", STARTED, {}, "deleted"),
        ("failed", STARTED, {}, "deleted"),
        ("failed", STARTED, {"dry_run": True}, "would delete"),
        ("running", STARTED, {}, "left"),
        ("failed", None, {}, "left"),
        ("failed", None, {"stop_unknown": True}, "deleted"),
        (None, STARTED, {}, "left"),
        (None, STARTED, {"stop_unknown": True}, "deleted"),
    ],
)
def test_the_reaper_deletes_the_fleets_of_dag_runs_that_have_ended(
    client: Client, state: str | None, started: Any, options: dict[str, bool], action: str
) -> None:
    client.fleets.apply(TWO, name="own")
    name = create().execute(context_of())
    facts = None if state is None else TaskFacts("success", None, state, started)
    (found,) = reap_fleets(
        client,
        lambda task: facts,
        **{"dry_run": False, "stop_unknown": False, **options},
        log=logging.getLogger("reap"),
    )
    assert (found.fleet_name, found.task_instance, found.action) == (name, "etl/r/create", action)
    kept = {fleet.name for fleet in client.fleets.list() if not fleet.is_terminating}
    assert kept == ({"own"} if action == "deleted" else {"own", name})


def test_the_reaper_deletes_a_fleet_once_the_runs_that_it_stopped_have_ended(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"dry_run": False, "stop_unknown": False, "log": logging.getLogger("reap")}
    facts = TaskFacts("success", None, "failed", STARTED)
    name = create().execute(context_of())
    task = {"type": "task", "commands": ["trap '' INT; sleep 600"], "fleets": [name]}
    run = client.runs.submit(task, run_name="using")
    wait_for("running run", lambda: run.refresh().raw_status == "running")
    monkeypatch.setattr("airflow_provider_dstack._reap_fleets.IN_USE_SECONDS", 0.2)
    for least in (0.0, 1.0):
        monkeypatch.setattr("airflow_provider_dstack._reap_fleets._LEAST_SECONDS", least)
        (found,) = reap_fleets(client, lambda task: facts, **how)
        assert (found.action, found.reason) == ("left", "runs still use it; the next pass deletes it")
    monkeypatch.setattr("airflow_provider_dstack._reap_fleets.IN_USE_SECONDS", 30.0)
    run.stop()
    (found,) = reap_fleets(client, lambda task: facts, **how)
    assert found.action == "deleted"
    assert all(fleet.is_terminating for fleet in client.fleets.list())


def test_the_reaper_reports_what_it_could_not_delete(server: LocalServer, client: Client) -> None:
    create().execute(context_of())
    facts = TaskFacts("success", None, "failed", STARTED)
    how: dict[str, Any] = {"dry_run": False, "stop_unknown": False, "log": logging.getLogger("reap")}
    server.faults.add("/fleets/delete", status=403)
    (found,) = reap_fleets(client, lambda task: facts, **how)
    assert found.action == "not deleted"
    assert found.fleet_name in str(fleet_failure([found]))

    def broken(task: Any) -> Any:
        raise OSError("database is away")

    with pytest.raises(DstackError, match=r"database is away\. No fleet was deleted"):
        reap_fleets(client, broken, **how)
