"""Volumes of a DAG run: created once, mounted by its tasks, deleted by a teardown alone; others are left."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack._compat import AirflowFailException, TaskFacts
from airflow_provider_dstack._reap_fleets import reap_fleets
from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted, DstackServerUnreachable
from airflow_provider_dstack.volumes import DstackDeleteVolumeOperator, DstackVolumeOperator
from dstack_core import Client, VolumeConfiguration
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, connection_json, paths, wait_for
from tests.provider_airflow.tries import STARTED

AWS = {"type": "volume", "backend": "aws", "region": "us-east-1", "size": "10GB"}


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_core._flow.volumes.PAUSE_SECONDS", 0.1)


def make_server(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[LocalServer]:
    with LocalServer(**{"instance_seconds": 0.02, **options}) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        yield server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    yield from make_server(monkeypatch)


@pytest.fixture
def slow_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """Return a server whose volumes do not become active."""
    yield from make_server(monkeypatch, instance_seconds=600.0)


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


def context_of(map_index: int = -1, task_id: str = "create", **changes: Any) -> Any:
    facts = {"dag_id": "etl", "run_id": "r", "task_id": task_id, "try_number": 1, "max_tries": 0, **changes}
    ti = Ti(**facts, map_index=map_index, pushed={})
    return {"ti": ti, "dag_run": SimpleNamespace(start_date=STARTED)}


def create(configuration: Any = None, **options: Any) -> DstackVolumeOperator:
    given = {"retry_budget": 5.0, **options}
    return DstackVolumeOperator(task_id="create", configuration=configuration or AWS, **given)


def delete(**options: Any) -> DstackDeleteVolumeOperator:
    given = options or {"volume_of": "create"}
    return DstackDeleteVolumeOperator(task_id="delete", retry_budget=5.0, **given)


def names(client: Client) -> set[str]:
    return {volume.name for volume in client.volumes.list()}


def test_the_tasks_between_setup_and_teardown_share_a_volume(dag_runner: DagRunner, client: Client) -> None:
    def task(command: str) -> str:
        return (
            "{'type': 'task', 'commands': ['"
            + command
            + "'], 'volumes': [f'{create.output}:/workflow/data']}"
        )

    def run(name: str, command: str) -> str:
        return f"DstackRunOperator(task_id={name!r}, configuration={task(command)}, poll_interval=0.2)"

    ran = dag_runner.run_tasks(
        "from airflow_provider_dstack.volumes import DstackDeleteVolumeOperator, DstackVolumeOperator\n"
        f"create = DstackVolumeOperator(task_id='create', configuration={AWS!r})\n"
        f"first = {run('first', 'echo kept > data/x')}\n"
        f"second = {run('second', 'grep kept data/x')}\n"
        "delete = DstackDeleteVolumeOperator(task_id='delete', volume_of=create)\n"
        "create >> first >> second >> delete.as_teardown(setups=create)\n"
    )
    assert ran.tasks == dict.fromkeys(("create", "first", "second", "delete"), "success")
    name = ran.values["create"]
    assert name.startswith(ran.dag_id.replace("_", "-"))
    assert ran.values["delete"] == {name: "deleted"}
    assert names(client) == set()


def test_a_retry_finds_the_volume_and_a_lost_reply_makes_no_second(
    server: LocalServer, client: Client
) -> None:
    context = context_of()
    server.faults.add("/volumes/create", drop="after")
    name = create().execute(context)
    assert context["ti"].pushed == {"dstack_volume_name": name}
    (first,) = client.volumes.list()
    assert first.is_active
    assert create().execute(context_of()) == name
    assert [volume.id for volume in client.volumes.list()] == [first.id]
    assert delete().execute(context_of(task_id="delete")) == {name: "deleted"}
    assert delete().execute(context_of(task_id="delete")) == {}
    assert delete(name=[name, "None", ""]).execute(context_of(task_id="delete")) == {name: "gone"}


def test_each_dag_run_and_each_index_has_a_volume_of_its_own(client: Client) -> None:
    made = [create().execute(context) for context in (context_of(), context_of(3), context_of(run_id="r2"))]
    assert len(set(made)) == 3
    assert create(name="data").execute(context_of(3)) == "data-3"
    assert delete().execute(context_of(3, "delete")) == {made[1]: "deleted", "data-3": "deleted"}
    assert delete().execute(context_of(task_id="delete")) == {made[0]: "deleted"}
    assert names(client) == {made[2]}
    cleared = context_of(task_id="delete", run_id="r2")
    cleared["dag_run"].start_date = STARTED.replace(year=STARTED.year + 1)
    assert delete().execute(cleared) == {}
    cleared["ti"].pushed["dstack_volume_name"] = made[2]
    assert delete().execute(cleared) == {made[2]: "deleted"}


def test_a_volume_that_is_kept_is_found_by_every_dag_run(client: Client) -> None:
    kept = create({**AWS, "tags": {"team": "nlp"}}, name="data", keep=True)
    assert {kept.execute(context_of(run_id=run)) for run in ("r1", "r2")} == {"data"}
    (volume,) = client.volumes.list()
    assert volume.tags["team"] == "nlp"
    with pytest.raises(AirflowFailException, match="a volume of that name has other tags"):
        create(name="data", keep=True).execute(context_of(dag_id="other"))
    assert delete(name="data").execute(context_of(task_id="delete")) == {"data": "deleted"}


def test_a_volume_of_another_owner_is_left_alone(client: Client) -> None:
    client.volumes.apply(AWS, name="data")
    with pytest.raises(AirflowFailException, match="a volume of that name has no tags"):
        create(name="data").execute(context_of())
    with pytest.raises(AirflowFailException, match="a volume that this DAG created, got 'data'"):
        delete(name="data").execute(context_of(task_id="delete"))
    create(name="own").execute(context_of(dag_id="other"))
    with pytest.raises(AirflowFailException, match=r"got 'own', which it did not create\. It was left alone"):
        delete(name=["own"]).execute(context_of(task_id="delete"))
    assert names(client) == {"data", "own"}


def test_a_volume_that_runs_use_is_deleted_once_they_have_ended(
    server: LocalServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dstack._resource_waits._IN_USE_SECONDS", 0.2)
    name = create().execute(context_of())
    task = {"type": "task", "commands": ["sleep 1"], "volumes": [f"{name}:/workflow/data"]}
    run = client.runs.submit(task)
    wait_for("running run", lambda: run.refresh().raw_status == "running")
    with pytest.raises(DstackError, match="Volume is in use"):
        delete(name=name, wait_timeout=1).execute(context_of(task_id="delete"))
    assert delete(name=name).execute(context_of(task_id="delete")) == {name: "deleted"}


def test_a_volume_that_does_not_become_active_is_deleted(slow_server: LocalServer) -> None:
    with pytest.raises(DstackError, match="expected it to be active within 1 s"):
        create(wait_timeout=1).execute(context_of())
    assert deletions(slow_server) == 1


def test_a_volume_that_fails_is_deleted_so_that_a_retry_can_create_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for server in make_server(monkeypatch, regions={"gcp/us-west1": 1.0}):
        for keep in (False, True):
            with pytest.raises(DstackError, match="could not be created: Backend not available"):
                create(name="data", keep=keep).execute(context_of())
            with server.client() as client:
                wait_for("deletion", lambda: client.volumes.get("data") is None)
        assert deletions(server) == 2


def deletions(server: LocalServer) -> int:
    return len(paths(server, "/volumes/delete"))


def test_a_task_that_is_killed_deletes_its_volume(slow_server: LocalServer) -> None:
    task = create()
    timer = threading.Timer(0.7, task.on_kill)
    timer.start()
    with pytest.raises(DstackRunInterrupted, match="ended before its volume was active"):
        task.execute(context_of())
    timer.join()
    assert deletions(slow_server) >= 1
    ending = delete(name="data")
    ending.on_kill()
    with pytest.raises(DstackRunInterrupted, match="before the volume was gone"):
        ending._sleep(60)


def test_a_killed_task_deletes_its_volume_once_and_logs_it_once(
    slow_server: LocalServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill is handled in the task's own thread, in the midst of a wait."""
    task = create()
    wait = task._sleep

    def killed(seconds: float) -> None:
        if seconds:
            task.on_kill()
        wait(seconds)

    monkeypatch.setattr(task, "_sleep", killed)
    with pytest.raises(DstackRunInterrupted):
        task.execute(context_of())
    assert deletions(slow_server) == 1
    assert "".join(capfd.readouterr()).count("of this task is deleted") == 1


def test_an_active_volume_of_a_task_that_fails_later_is_kept(server: LocalServer, client: Client) -> None:
    name = create().execute(context_of())
    server.faults.add("/volumes/get", times=1, status=403)
    with pytest.raises(AirflowFailException):
        create().execute(context_of())
    create().on_kill()
    assert names(client) == {name}


def test_a_server_that_is_away_is_reported(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_dstack.volumes._DELETE_SECONDS", 0.2)
    server.faults.add("/volumes/get", times=None, status=503)
    with pytest.raises(DstackServerUnreachable):
        create(retry_budget=0).execute(context_of())


def test_the_forms_of_a_configuration(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "volume.dstack.yml"
    text = "type: volume\nname: ignored\nbackend: aws\nregion: us-east-1\nsize: 10GB\n"
    path.write_text(text)
    model = VolumeConfiguration(backend="aws", region="us-east-1", size="10GB")
    for index, form in enumerate([path, text, model]):
        create(form).execute(context_of(index))
    assert len(client.volumes.list()) == 3
    task = create("type: {{ params.kind }}\n")
    task.configuration = "type: task\n"
    with pytest.raises(AirflowFailException, match="configuration: expected `type: volume`, got 'task'"):
        task.execute(context_of())


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: delete(volume_of="a", name="b"), "expected volume_of .* or name .*, got both"),
        (lambda: DstackDeleteVolumeOperator(task_id="x"), "got neither"),
        (lambda: create(wait_timeout=0), "wait_timeout: expected 1 second or more"),
        (lambda: create(keep=True), "name: expected one for a volume with keep=True"),
        (lambda: create(keep="yes", name="data"), "keep: expected True or False"),
        (
            lambda: create({**AWS, "size": "-5GB"}),
            r"VolumeConfiguration\.size: expected a size above 0.*'-5GB'",
        ),
        (lambda: create({"backend": "aws"}), 'VolumeConfiguration: expected size such as "100GB"'),
        (lambda: create("type: task\n"), "configuration: expected `type: volume`, got 'task'"),
        (lambda: create(name="My_Volume"), "name: expected 2 to 41 lower-case letters.*, got 'My_Volume'"),
    ],
)
def test_wrong_arguments_are_reported_when_the_dag_is_parsed(make: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()


def test_the_reaper_leaves_volumes_alone(client: Client) -> None:
    name = create().execute(context_of())
    facts = TaskFacts("success", None, "failed", STARTED)
    found = reap_fleets(
        client, lambda task: facts, dry_run=False, stop_unknown=True, log=logging.getLogger("reap")
    )
    assert list(found) == []
    assert names(client) == {name}
