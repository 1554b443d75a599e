"""A task with fallbacks whose worker is lost at any step: the next try finds the newest one and continues."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from airflow_provider_dstack import _submission
from airflow_provider_dstack._names import MarkedTask, TaskNames, run_ref
from airflow_provider_dstack._previous_try import RECORD_KEY, Record
from airflow_provider_dstack._runs_of_tasks import is_of
from airflow_provider_dstack.errors import DstackUserError
from dstack_core import Run, Task
from dstack_core.integration import step_ref
from dstack_core.local import LocalServer
from tests.provider_airflow.support import over, paths, wait_for
from tests.provider_airflow.tries import BrokenStore, Store, Tries

FALLBACKS: list[dict[str, Any]] = [{"max_price": 50.0}, {"max_price": 60.0}]
GIVEN: dict[str, Any] = {"fallbacks": FALLBACKS, "fallback_on_exit": {137: "next"}}


@pytest.fixture(params=["store", "names alone", "broken store"])
def tries(request: pytest.FixtureRequest, server: LocalServer) -> Tries:
    stores = {"store": Store(), "names alone": None, "broken store": BrokenStore()}
    return Tries(server, stores[request.param], **GIVEN)


def lost(tries: Tries, *commands: str, is_submitted: bool = True, name: str | None = None) -> list[Run]:
    """Leave behind what a worker does that is lost in the last of these steps; return the runs."""
    first = tries.names.run if name is None else run_ref(name, tries.names.run.marker)
    runs = []
    for number, command in enumerate(commands, 1):
        ref = step_ref(first, number)
        # A worker writes the record before it submits.
        if type(tries.store) is Store:
            record = Record(ref.name, ref.marker, "main", tries.ti.try_number, tries.ti.max_tries)
            tries.store.set(RECORD_KEY, asdict(record))
        if number == len(commands) and not is_submitted:
            break
        run = tries.server.client().runs.submit(
            Task(commands=[command]), run_name=ref.name, marker=ref.marker
        )
        runs.append(run if number == len(commands) else over(run))
    tries.next_try()
    return runs


def prices(tries: Tries) -> list[Any]:
    return [run.configuration.get("max_price") for run in tries.server.runs]


def test_a_retry_follows_the_newest_step(tries: Tries) -> None:
    first, second = lost(tries, "exit 137", "sleep 2; echo fine")
    result = tries.execute("echo never")
    assert result["run_id"] == second.id
    assert len(tries.runs()) == 2
    # The outcome has the attempts and the cost of the step that the lost worker has seen.
    assert [one["exit_status"] for one in result["attempts"]] == [137, 0]
    costs = [run.refresh().cost for run in (first, second)]
    assert result["cost"] == pytest.approx(sum(costs), abs=1e-4)


def test_a_retry_takes_the_step_that_succeeded_meanwhile(tries: Tries) -> None:
    _, second = lost(tries, "exit 137", "true")
    over(second)
    assert tries.execute("echo never")["run_id"] == second.id


def test_a_retry_continues_with_the_step_after_the_one_it_finds(tries: Tries) -> None:
    lost(tries, "exit 137", "sleep 1; exit 137")
    result = tries.execute("true")
    third = step_ref(_first_try(tries), 3)
    assert (result["run_name"], len(tries.runs())) == (third.name, 3)
    assert [one["exit_status"] for one in result["attempts"]] == [137, 137, 0]
    assert prices(tries)[-1] == 60.0
    assert tries.server.runs[-1].marker == third.marker


def test_a_worker_that_was_lost_between_two_steps(tries: Tries) -> None:
    over(lost(tries, "exit 137")[0])
    result = tries.execute("true")
    assert result["run_name"] == step_ref(_first_try(tries), 2).name
    assert prices(tries) == [None, 50.0]


def test_a_worker_that_was_lost_while_it_submitted_the_next_step(tries: Tries) -> None:
    lost(tries, "exit 137", "", is_submitted=False)
    assert tries.execute("true")["run_name"] == step_ref(_first_try(tries), 2).name
    assert prices(tries) == [None, 50.0]


def test_a_job_whose_last_step_failed_begins_a_new_one(tries: Tries) -> None:
    for commands in (("exit 137", "exit 3"), ("exit 137", "exit 137", "exit 137")):
        over(lost(tries, *commands)[-1])
        assert tries.execute("true")["run_name"] == tries.names.run.name
        tries.next_try(cleared=True)


def test_a_cleared_task_stops_the_newest_step_and_begins_anew(tries: Tries) -> None:
    _, second = lost(tries, "exit 137", "sleep 600")
    tries.ti.max_tries += 2
    assert tries.execute("true")["run_name"] == tries.names.run.name
    assert second.refresh().raw_status == "terminated"
    assert len(paths(tries.server, "/runs/stop")) == 1


def test_a_chosen_name_is_found_at_its_newest_step(tries: Tries) -> None:
    tries.arguments["run_name"] = "fit"
    # Of an earlier job of the task.
    over(lost(tries, "exit 137", "exit 137", "exit 3", name="fit")[-1])
    _, second = lost(tries, "exit 137", "sleep 2", name="fit")
    assert tries.execute("echo never")["run_id"] == second.id


def _first_try(tries: Tries) -> Any:
    names = tries.names
    return run_ref(names.name_in(1), names.marker_in(1, tries.ti.max_tries))


def test_a_worker_that_is_lost_for_real_between_two_steps(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = Tries(server, Store(), on_kill_action="keep", **GIVEN)

    def lose(*given: Any, **more: Any) -> Any:
        raise OSError("the worker is lost")

    work = "case $DSTACK_RUN_NAME in *-s2) echo fine;; *) exit 137;; esac"
    with monkeypatch.context() as patch:
        patch.setattr(_submission.Submission, "obtain_next", lose)
        with pytest.raises(OSError, match="the worker is lost"):
            tries.execute(work)
    assert len(tries.runs()) == 1
    tries.next_try()
    assert tries.execute(work)["run_name"].endswith("-s2")
    assert len(tries.runs()) == 2


def test_a_fallback_that_was_removed_from_the_dag_ends_with_the_step_that_is_found(
    server: LocalServer,
) -> None:
    tries = Tries(server, Store(), **GIVEN)
    _, second = lost(tries, "exit 137", "sleep 1; exit 137")
    with pytest.raises(DstackUserError):
        tries.execute("echo never", fallbacks=None, fallback_on_exit=None)
    assert tries.runs()[0].id == second.id
    assert len(tries.runs()) == 2


@pytest.mark.parametrize("store", [Store(), None], ids=["store", "names alone"])
@pytest.mark.parametrize("durable", [True, False])
def test_what_a_failed_deferral_leaves_is_stopped_at_its_newest_step(
    server: LocalServer, store: Store | None, durable: bool
) -> None:
    """A deferral that failed: the operator knows its record, or no more than how its run is named."""
    tries = Tries(server, store, durable=durable, **GIVEN)
    _, second = lost(tries, "exit 137", "sleep 600")
    tries.ti.try_number -= 1
    tries.operator()._stop_leftover(tries.context)
    wait_for("end of step 2", lambda: second.refresh().outcome())
    assert second.raw_status == "terminated"


def test_the_markers_of_steps_are_those_of_their_task(server: LocalServer) -> None:
    tries = Tries(server, None)
    for keep in (False, True):
        names = TaskNames.of(tries.context, retries=2, keep=keep)
        for number in (1, 2, 12):
            ref = step_ref(names.run, number)
            assert names.read_marker(ref.marker) == (1, 2)
            assert (names.first_of(ref), run_ref(ref.name, ref.marker)) == (names.run, ref)
            assert ref.generated
            marked = MarkedTask.read(ref.marker)
            assert marked is not None
            assert (str(marked), marked.try_number, marked.keep) == ("d/r/train", 1, keep)
            run: Any = type("Run", (), {"marker": ref.marker, "name": ref.name})
            assert is_of(run, names, (), tries.context)
    chosen = TaskNames.of(tries.context, "fit", 2)
    assert chosen.first_of(step_ref(chosen.run, 3)) == chosen.run
    assert not step_ref(chosen.run, 3).generated
