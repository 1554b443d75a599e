"""What a try does with the previous try's run: the whole operator against a server, without Airflow's
components."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._previous_try import DECISIONS, RECORD_KEY, Decision, Record
from airflow_provider_dstack.errors import (
    DstackError,
    DstackRunFailed,
)
from dstack_core import Task
from dstack_core.local import LocalServer
from tests.provider_airflow.support import over, paths, wait_for
from tests.provider_airflow.tries import BrokenStore, Store, Tries, record_of


@pytest.fixture(params=["store", "names alone", "broken store"])
def tries(request: pytest.FixtureRequest, server: LocalServer) -> Tries:
    stores = {"store": Store(), "names alone": None, "broken store": BrokenStore()}
    return Tries(server, stores[request.param])


@pytest.fixture
def stored(server: LocalServer) -> Tries:
    return Tries(server, Store())


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


def test_a_retry_after_an_upgrade_follows_the_run_of_the_earlier_version(tries: Tries) -> None:
    run = tries.lost("sleep 1", former=True)
    assert run.name.startswith("af-")
    tries.next_try()
    result = tries.execute("echo never")
    assert (result["run_id"], result["run_name"]) == (run.id, run.name)
    assert len(tries.runs()) == 1


def test_a_retry_after_an_upgrade_whose_run_failed_has_todays_name(tries: Tries) -> None:
    over(tries.lost("exit 3", former=True))
    assert tries.execute("true")["run_name"] == tries.names.run.name
    assert len(tries.runs()) == 2


@pytest.mark.parametrize("former", [True, False])
def test_what_a_task_without_a_record_stops_is_the_run_of_its_version(
    server: LocalServer, former: bool
) -> None:
    """A deferral that failed: the operator knows no more than how its run is named."""
    tries = Tries(server, None, durable=False)
    ref = tries.names.former_run if former else tries.names.run
    run = server.client().runs.submit(Task(commands=["sleep 60"]), run_name=ref.name, marker=ref.marker)
    tries.operator()._stop_leftover(tries.context)
    assert run.refresh().last_status.is_ending


def test_a_retry_takes_the_result_of_a_run_that_succeeded_meanwhile(tries: Tries) -> None:
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
        tries.store.set(RECORD_KEY, record_of(tries))
    lost = tries.names.run
    tries.next_try()
    # The server handles the lost worker's request at the moment when the next try submits.
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


def test_a_task_that_is_not_durable_neither_reattaches_nor_writes_a_record(stored: Tries) -> None:
    run = stored.lost("sleep 600")
    assert stored.store is not None
    stored.store.values.clear()
    assert stored.execute("true", durable=False)["run_id"] != run.id
    assert stored.store.values == {}
    assert run.refresh().outcome() is None


def test_a_run_in_another_project_is_left_alone(stored: Tries, capfd: pytest.CaptureFixture[str]) -> None:
    assert stored.store is not None
    stored.store.set(RECORD_KEY, {**record_of(stored), "project": "elsewhere"})
    stored.next_try()
    stored.execute("true")
    assert "in project elsewhere. That run is left alone." in capfd.readouterr().out


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


def test_the_best_offer_is_logged_before_the_run_is_submitted(
    stored: Tries, capfd: pytest.CaptureFixture[str]
) -> None:
    stored.execute("true")
    output = capfd.readouterr().out
    assert output.count(f"Plan for run {stored.names.run.name}: best offer ") == 1
    assert "at 1.20 USD per hour" in output
    assert len(paths(stored.server, "/runs/get_plan")) == 1


def test_a_run_without_an_offer_is_submitted_anyway(stored: Tries, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DstackError):
        stored.execute("true", max_price=0.01)
    assert "no machine is on offer now. Submitting anyway." in capfd.readouterr().out
    assert len(stored.runs()) == 1


def test_an_exact_size_is_named_where_no_machine_is_on_offer(
    stored: Tries, capfd: pytest.CaptureFixture[str]
) -> None:
    what: dict[str, Any] = {"type": "task", "commands": ["true"], "resources": {"gpu": "16GB"}}
    hint = "gpu memory: 16GB is an exact size; write 16GB.. for at least that."
    with pytest.raises(DstackError) as caught:
        stored.execute(configuration=what)
    assert f"provisioning-fails). {hint} See http" in str(caught.value)
    assert ".)" not in str(caught.value)
    output = capfd.readouterr().out
    assert re.search(r"no machine is on offer now\. Submitting anyway\.\s", output)
    assert hint[:-1] not in output, "only the error has it"
    stored.next_try()
    with pytest.raises(DstackError):
        stored.execute(configuration={**what, "retry": {"on_events": ["no-capacity"], "duration": "1s"}})
    waits = "Submitting anyway, since the run's retry policy waits for one."
    assert f"no machine is on offer now. {hint} {waits}" in capfd.readouterr().out


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 400}, {"drop": "before"}, {"status": 200, "body": "<html>"}]
)
def test_a_failed_plan_does_not_prevent_the_submission(
    stored: Tries, capfd: pytest.CaptureFixture[str], fault: dict[str, Any]
) -> None:
    stored.server.faults.add("/runs/get_plan", times=None, **fault)
    assert stored.execute("true")["status"] == "done"
    assert "Could not get offers for run" in capfd.readouterr().out


def test_a_refusal_of_plan_and_submission_is_reported_once(
    stored: Tries, capfd: pytest.CaptureFixture[str]
) -> None:
    body = {"detail": [{"msg": "no such fleet", "code": "error"}]}
    for path in ("/runs/get_plan", "/runs/apply"):
        stored.server.faults.add(path, times=None, status=400, body=body)
    with pytest.raises(AirflowFailException, match="no such fleet"):
        stored.execute("true")
    assert "no such fleet" not in capfd.readouterr().out
