"""What a try does with the run of the try before: the whole operator against a server, without Airflow's
components; the store is a dict that lives as long as Airflow's would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import _stop
from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._durable import DECISIONS, RECORD_KEY, Decision, Record
from airflow_provider_dstack._names import TaskNames
from airflow_provider_dstack.errors import (
    DstackError,
    DstackRunFailed,
    DstackRunInterrupted,
    DstackServerUnreachable,
)
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Run, Task
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for

STARTED = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Store:
    """Keep values as Airflow's task state store does."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value

    def delete(self, key: str) -> None:
        self.values.pop(key, None)


class BrokenStore(Store):
    """Fail as the store does when its backend is away."""

    def get(self, key: str) -> Any:
        raise OSError("the store is away")

    def set(self, key: str, value: Any) -> None:
        raise OSError("the store is away")

    delete = get


class Tries:
    """Be one task instance over its tries; ``store`` None is Airflow before 3.3."""

    def __init__(self, server: LocalServer, store: Store | None, **arguments: Any) -> None:
        self.server = server
        self.store = store
        self.arguments = {"poll_interval": 0.1, "retries": 2, **arguments}
        self.ti = SimpleNamespace(
            dag_id="d", run_id="r", task_id="train", try_number=1, max_tries=2, map_index=-1, id="1"
        )

    def next_try(self, *, cleared: bool = False) -> None:
        if cleared:
            self.ti.max_tries = self.ti.try_number + 2
        self.ti.try_number += 1
        self.ti.id = f"{self.ti.id}'"

    def operator(self, *commands: str, **arguments: Any) -> DstackRunOperator:
        return DstackRunOperator(
            task_id="train",
            configuration=Task(commands=list(commands or ("true",))),
            **{**self.arguments, **arguments},
        )

    @property
    def context(self) -> Any:
        context: dict[str, Any] = {"ti": self.ti, "dag_run": SimpleNamespace(start_date=STARTED)}
        return context if self.store is None else {**context, "task_state_store": self.store}

    @property
    def names(self) -> TaskNames:
        return TaskNames.of(self.context, retries=2)

    def lost(self, *commands: str) -> Run:
        """Leave behind what a worker does that is lost while the run goes on."""
        names = self.names
        run = self.server.client().runs.submit(
            Task(commands=list(commands)), run_name=names.run.name, marker=names.run.marker
        )
        if type(self.store) is Store:
            told = Record(*names.run, "main", self.ti.try_number, self.ti.max_tries)
            self.store.set(RECORD_KEY, {name: getattr(told, name) for name in told.__slots__})
        self.next_try()
        return run

    def execute(self, *commands: str, **arguments: Any) -> dict[str, Any]:
        result: dict[str, Any] = self.operator(*commands, **arguments).execute(self.context)
        return result

    def runs(self) -> list[Run]:
        return self.server.client().runs.list(all=True)


@pytest.fixture(params=["store", "names alone", "broken store"])
def tries(request: pytest.FixtureRequest, server: LocalServer) -> Tries:
    stores = {"store": Store(), "names alone": None, "broken store": BrokenStore()}
    return Tries(server, stores[request.param])


@pytest.fixture
def stored(server: LocalServer) -> Tries:
    return Tries(server, Store())


def over(run: Run) -> Run:
    wait_for(f"end of run {run.name}", lambda: run.refresh().outcome(), 30)
    return run


def test_the_table_is_complete() -> None:
    states = {state for _, state in DECISIONS}
    assert set(DECISIONS) == {(kind, state) for kind in ("retried", "cleared") for state in states}
    # A cleared task never takes a run over, and a run on its way to its end is never taken over.
    assert Decision.REATTACH not in {what for (kind, _), what in DECISIONS.items() if kind == "cleared"}
    assert {DECISIONS[kind, "stopping"] for kind in ("retried", "cleared")} == {Decision.WAIT}


def test_a_retry_follows_the_run_of_the_lost_worker(tries: Tries, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    run = tries.lost("echo first", f"until [ -e {gate} ]; do sleep 0.1; done; echo last")
    gate.touch()
    result = tries.execute("echo never")
    assert result["run_id"] == run.id
    assert [one.id for one in tries.runs()] == [run.id]
    assert paths(tries.server, "/runs/stop") == []


def test_a_retry_takes_the_result_of_a_run_that_succeeded_unseen(tries: Tries) -> None:
    run = over(tries.lost("true"))
    assert tries.execute("echo never")["run_id"] == run.id
    assert len(tries.runs()) == 1


def test_a_retry_after_a_failed_run_starts_a_new_one(tries: Tries) -> None:
    run = over(tries.lost("exit 3"))
    result = tries.execute("true")
    assert result["run_id"] != run.id
    assert result["run_name"] != run.name


def test_a_third_try_finds_the_run_that_the_second_took_over(tries: Tries) -> None:
    run = tries.lost("sleep 2")
    tries.next_try()
    assert tries.execute("echo never")["run_id"] == run.id


def test_a_run_that_stops_is_waited_for_and_not_taken_over(tries: Tries) -> None:
    run = tries.lost("trap 'sleep 1.5; exit 1' INT TERM; while true; do sleep 0.1; done")
    wait_for("running run", lambda: run.refresh().raw_status == "running")
    run.stop()
    result = tries.execute("true")
    assert result["run_id"] != run.id
    assert {one.id: one.raw_status for one in tries.runs()} == {
        run.id: "terminated",
        result["run_id"]: "done",
    }


def test_a_cleared_task_stops_the_old_run_and_starts_a_new_one(stored: Tries) -> None:
    run = stored.lost("sleep 600")
    stored.ti.max_tries = 4
    result = stored.execute("true")
    assert result["run_id"] != run.id
    assert run.refresh().raw_status == "terminated"


def test_a_cleared_success_runs_again(tries: Tries) -> None:
    first = tries.execute("true")
    tries.next_try(cleared=True)
    second = tries.execute("true")
    assert first["run_id"] != second["run_id"]
    if type(tries.store) is Store:
        assert tries.store.values == {}


def test_a_submission_under_way_when_its_worker_was_lost_makes_no_second_run(tries: Tries) -> None:
    if type(tries.store) is Store:
        tries.store.set(RECORD_KEY, _record(tries))
    lost = tries.names.run
    tries.next_try()
    # The request of the lost worker is carried out in the very moment in which the next try submits.
    with ThreadPoolExecutor() as pool:
        tries.server.faults.add("/runs/apply", times=2, delay=0.5)
        late = pool.submit(
            lambda: tries.server.client().runs.submit(
                Task(commands=["true"]), run_name=lost.name, marker=lost.marker
            )
        )
        result = tries.execute("true")
    assert result["run_id"] == late.result().id
    assert len(tries.runs()) == 1


def test_the_record_is_there_before_the_run_is_submitted(stored: Tries) -> None:
    stored.server.faults.add("/runs/apply", times=None, status=400)
    with pytest.raises(AirflowFailException):
        stored.execute("true")
    assert stored.store is not None
    record = Record.read(stored.store.get(RECORD_KEY))
    assert record is not None
    assert record.run == stored.names.run
    assert (record.try_number, record.max_tries, record.run_id) == (1, 2, None)


def test_a_task_that_is_not_durable_neither_looks_nor_writes(stored: Tries) -> None:
    run = stored.lost("sleep 600")
    assert stored.store is not None
    stored.store.values.clear()
    assert stored.execute("true", durable=False)["run_id"] != run.id
    assert stored.store.values == {}
    assert run.refresh().outcome() is None


def test_a_run_in_another_project_is_left_alone(stored: Tries, capfd: pytest.CaptureFixture[str]) -> None:
    assert stored.store is not None
    stored.store.set(RECORD_KEY, {**_record(stored), "project": "elsewhere"})
    stored.next_try()
    stored.execute("true")
    assert "in project elsewhere; that run is left alone" in capfd.readouterr().out


def test_a_record_of_another_version_is_not_read(stored: Tries) -> None:
    assert stored.store is not None
    stored.store.set(RECORD_KEY, {"of": "another version"})
    stored.next_try()
    assert stored.execute("true")["status"] == "done"


def test_the_same_name_is_free_again_for_the_next_try(server: LocalServer) -> None:
    tries = Tries(server, Store(), run_name="training")
    with pytest.raises(DstackRunFailed):
        tries.execute("exit 1")
    tries.next_try()
    assert tries.execute("true")["run_name"] == "training"


def _record(tries: Tries) -> dict[str, Any]:
    return {
        "run_name": tries.names.run.name,
        "marker": tries.names.run.marker,
        "project": "main",
        "try_number": 1,
        "max_tries": 2,
        "run_id": None,
    }


@pytest.mark.parametrize(("try_number", "left"), [(1, True), (3, False)], ids=["tries left", "last try"])
def test_a_task_that_loses_sight_of_its_run_leaves_it_to_the_next_try(
    stored: Tries, try_number: int, left: bool
) -> None:
    stored.ti.try_number = try_number
    stored.server.faults.add("/logs/poll", times=None, status=503)
    with pytest.raises(DstackServerUnreachable):
        stored.execute("sleep 600", retry_budget=0.5)
    (run,) = stored.runs()
    assert (paths(stored.server, "/runs/stop") == []) is left
    if left:
        stored.server.faults.clear()
        stored.next_try()
        stored.server.client().runs.stop(run.name)
        with pytest.raises(DstackError):
            stored.execute("exit 5")
        assert len(stored.runs()) == 2


class Policy:
    """Decide like a retry policy of Airflow 3.3."""

    def __init__(self, action: str) -> None:
        self.action = action

    def evaluate(self, **told: Any) -> Any:
        assert isinstance(told["exception"], DstackServerUnreachable)
        return SimpleNamespace(action=SimpleNamespace(value=self.action))


@pytest.mark.parametrize(("action", "left"), [("fail", False), ("retry", True), ("default", True)])
def test_a_retry_policy_is_asked_whether_there_is_a_next_try(
    stored: Tries, action: str, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Tries, "context", {**stored.context, "task": SimpleNamespace(retry_policy=Policy(action))}
    )
    stored.server.faults.add("/logs/poll", times=None, status=503)
    with pytest.raises(DstackServerUnreachable):
        stored.execute("sleep 600", retry_budget=0.5)
    assert (paths(stored.server, "/runs/stop") == []) is left


def killed_while_running(tries: Tries, monkeypatch: pytest.MonkeyPatch, state: Callable[[], Any]) -> Run:
    """Kill the task while its run goes on and Airflow answers ``state`` about it; return the run."""
    monkeypatch.setattr(_stop, "task_state", lambda ti: state())
    operator = tries.operator("sleep 600")

    def kill() -> None:
        wait_for("running run", lambda: [one for one in tries.runs() if one.raw_status == "running"])
        operator.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DstackRunInterrupted):
        operator.execute(tries.context)
    thread.join()
    (run,) = tries.runs()
    return run


@pytest.mark.parametrize("state", ["running", "up_for_retry", "queued"])
def test_a_worker_that_goes_away_leaves_the_run_to_the_next_try(
    stored: Tries, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    run = killed_while_running(stored, monkeypatch, lambda: state)
    assert paths(stored.server, "/runs/stop") == []
    assert run.outcome() is None


def _unknown() -> str:
    raise OSError("Airflow does not answer")


@pytest.mark.parametrize(
    ("state", "try_number"),
    [
        (lambda: "failed", 1),
        (lambda: "success", 1),
        (lambda: "restarting", 1),
        (lambda: None, 1),
        (_unknown, 1),
        (lambda: "running", 3),
    ],
    ids=["failed", "success", "cleared", "no such task", "unknown", "last try"],
)
def test_a_task_that_somebody_ended_or_that_has_no_next_try_stops_its_run(
    stored: Tries, monkeypatch: pytest.MonkeyPatch, state: Callable[[], Any], try_number: int
) -> None:
    stored.ti.try_number = try_number
    run = over(killed_while_running(stored, monkeypatch, state))
    assert run.raw_status == "terminated"


def test_airflows_silence_does_not_delay_the_stop(stored: Tries, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()
    run = killed_while_running(stored, monkeypatch, lambda: silence.wait(60) and "running")
    silence.set()
    assert len(paths(stored.server, "/runs/stop")) == 1
    assert over(run).raw_status == "terminated"


def test_the_best_offer_is_told_before_the_run_is_submitted(
    stored: Tries, capfd: pytest.CaptureFixture[str]
) -> None:
    stored.execute("true")
    output = capfd.readouterr().out
    assert output.count(f"Plan for run {stored.names.run.name}: best offer ") == 1
    assert "at 1.2 USD per hour" in output
    assert len(paths(stored.server, "/runs/get_plan")) == 1


def test_no_offer_is_told_and_the_run_submitted_all_the_same(
    stored: Tries, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DstackError):
        stored.execute("true", max_price=0.01)
    assert "no machine is on offer now; it is submitted all the same" in capfd.readouterr().out
    assert len(stored.runs()) == 1


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 400}, {"drop": "before"}, {"status": 200, "body": "<html>"}]
)
def test_a_plan_that_cannot_be_told_harms_nothing(
    stored: Tries, capfd: pytest.CaptureFixture[str], fault: dict[str, Any]
) -> None:
    stored.server.faults.add("/runs/get_plan", times=None, **fault)
    assert stored.execute("true")["status"] == "done"
    assert "cannot be told" in capfd.readouterr().out
