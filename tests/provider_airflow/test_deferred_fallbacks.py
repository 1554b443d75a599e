"""``fallbacks`` of a deferred task: a trigger follows one run, and the resumed worker submits the next."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dstack import operators, triggers
from airflow_provider_dstack._compat import AirflowTaskTimeout
from airflow_provider_dstack._previous_try import RECORD_KEY
from airflow_provider_dstack._submission import Submission
from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted, DstackSpotInterrupted
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import CallbackEvent, RunCallbacks
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for
from tests.provider_airflow.test_checkpoint import xcoms  # noqa: F401
from tests.provider_airflow.test_fallbacks import names
from tests.provider_airflow.test_function_call import Decorated
from tests.provider_airflow.test_remaining_log import worker_log  # noqa: F401
from tests.provider_airflow.test_trigger_relay import Log, log  # noqa: F401
from tests.provider_airflow.tries import Store, Tries
from tests.provider_airflow.triggering import killed, payloads, until
from tests.provider_airflow.versions import TaskDeferred

# Longer than a worker follows it.
ROWS = "for i in 1 2 3 4; do echo row-$i; sleep 0.5; done"
FIRST_FAILS = f"{ROWS}; case $DSTACK_RUN_NAME in *-s2) ;; *) exit 137;; esac"
GIVEN: dict[str, Any] = {
    "deferrable": True,
    "fallbacks": [{"max_price": 50.0}],
    "fallback_on_exit": {137: "next"},
}

pytestmark = pytest.mark.usefixtures("xcoms")


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer early; without a scheduler, no event is held back for it."""
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 0.5)
    monkeypatch.setattr(triggers, "_LONGEST_HOLD_SECONDS", 0.0)


@pytest.fixture(params=["store", "names alone"])
def tries(request: pytest.FixtureRequest, server: LocalServer) -> Tries:
    return Tries(server, Store() if request.param == "store" else None, **GIVEN)


def deferred(execute: Callable[[], Any]) -> Any:
    """Return the deferral that a task asks for."""
    with pytest.raises(TaskDeferred) as caught:
        execute()
    return caught.value


def trigger_of(tries: Tries, deferral: Any, log: Log | None = None) -> DstackRunTrigger:  # noqa: F811
    """Return the trigger as another process makes it."""
    _, arguments = deferral.trigger.serialize()
    trigger = DstackRunTrigger(**json.loads(json.dumps(arguments)))
    trigger.task_instance = tries.ti  # type: ignore[assignment]  # what is used of one
    return trigger if log is None else log.of(trigger)


def event_of(trigger: DstackRunTrigger) -> Any:
    (payload,) = asyncio.run(payloads(trigger))
    return json.loads(json.dumps(payload))


def first_end(tries: Tries, command: str = FIRST_FAILS, **given: Any) -> Any:
    """Run a task up to the event of its first step's end."""
    deferral = deferred(lambda: tries.execute(command, **given))
    return event_of(trigger_of(tries, deferral))


def nothing_runs(tries: Tries) -> None:
    wait_for("end of all runs", lambda: all(run.outcome() for run in tries.runs()))


def rows(lines: list[str]) -> list[str]:
    return [line for line in lines if "row-" in line]


def test_a_deferred_task_defers_again_for_the_next_step(
    tries: Tries,
    log: Log,  # noqa: F811
    worker_log: Log,  # noqa: F811
) -> None:
    deferral = deferred(lambda: tries.execute(FIRST_FAILS))
    event = event_of(trigger_of(tries, deferral, log))
    again = deferred(lambda: tries.operator(FIRST_FAILS).execute_complete(tries.context, event))
    assert again.trigger.run_name.endswith("-s2")
    assert again.trigger.marker.endswith("/step2")
    result = tries.operator().execute_complete(tries.context, event_of(trigger_of(tries, again, log)))
    assert names(tries.server) == ["NAME", "NAME-s2"]
    assert result["run_name"] == again.trigger.run_name
    assert [(one["number"], one["exit_status"]) for one in result["attempts"]] == [(1, 137), (2, 0)]
    assert result["cost"] == pytest.approx(sum(run.cost for run in tries.runs()), abs=1e-4)
    assert result["duration"] > 3
    if tries.store is not None:
        assert tries.store.get(RECORD_KEY) is None
    shown = sorted(rows([*log.lines, *worker_log.lines]))
    assert shown == sorted([f"{part}row-{i}" for part in ("", "[attempt 2] ") for i in (1, 2, 3, 4)])
    # Those of one step come in order in each of both logs.
    for lines in (log.lines, worker_log.lines):
        assert rows(lines) == sorted(rows(lines), key=lambda line: ("attempt" in line, line))


def test_the_budget_of_the_log_counts_all_steps(tries: Tries) -> None:
    # Four lines of six bytes, and four of 18 bytes: "[attempt 2] row-1".
    event = first_end(tries, log_budget_bytes=42)
    again = deferred(
        lambda: tries.operator(FIRST_FAILS, log_budget_bytes=42).execute_complete(tries.context, event)
    )
    assert event["relayed"] == {"relayed_bytes": 24, "left_out_bytes": 0}
    assert 24 <= again.trigger.relayed_bytes <= 42
    assert again.trigger.tail[:4] == ["row-1", "row-2", "row-3", "row-4"]
    last = event_of(trigger_of(tries, again))
    assert last["relayed"] == {"relayed_bytes": 42, "left_out_bytes": 54}


def test_a_step_that_ends_the_job_submits_nothing_more(tries: Tries) -> None:
    event = first_end(tries, f"{ROWS}; exit 3")
    with pytest.raises(DstackError, match="status 3"):
        tries.operator().execute_complete(tries.context, event)
    assert names(tries.server) == ["NAME"]
    tries.next_try(cleared=True)
    assert tries.operator().execute_complete(tries.context, first_end(tries, ROWS))["status"] == "done"
    assert len(tries.runs()) == 2


def test_a_short_next_step_needs_no_triggerer(tries: Tries) -> None:
    event = first_end(tries)
    result = tries.operator("echo fine").execute_complete(tries.context, event)
    assert [one["exit_status"] for one in result["attempts"]] == [137, 0]


def test_the_last_step_fails_the_task(tries: Tries) -> None:
    tries.server.scenarios.interrupt_after(1, noticed_after=0, times=2)
    given: dict[str, Any] = {"spot_policy": "spot"}
    event = first_end(tries, ROWS, **given)
    again = deferred(lambda: tries.operator(ROWS, **given).execute_complete(tries.context, event))
    with pytest.raises(DstackSpotInterrupted) as raised:
        tries.operator(ROWS, **given).execute_complete(tries.context, event_of(trigger_of(tries, again)))
    assert len(raised.value.outcome["attempts"]) == 2


def test_a_function_falls_back_after_a_deferral(server: LocalServer) -> None:
    def fit() -> str:
        import os
        import sys
        import time

        time.sleep(2)
        if not os.environ["DSTACK_RUN_NAME"].endswith("-s2"):
            sys.exit(137)
        return "fitted"

    tried = Decorated(server, Store(), **GIVEN)
    event = event_of(trigger_of(tried, deferred(lambda: tried.call(fit))))
    again = deferred(lambda: tried.decorated(fit).execute_complete(tried.context, event))
    last = event_of(trigger_of(tried, again))
    assert tried.decorated(fit).execute_complete(tried.context, last) == "fitted"
    assert names(server) == ["NAME", "NAME-s2"]


def test_execution_timeout_counts_from_the_start_over_all_steps(
    tries: Tries, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries.ti.start_date = datetime.now(UTC)
    limit: dict[str, Any] = {"execution_timeout": timedelta(seconds=900)}
    event = first_end(tries, **limit)
    deadline = tries.ti.start_date.timestamp() + 900
    # Before Airflow 3.3 a resumed task has another start.
    tries.ti.start_date = datetime.now(UTC) + timedelta(seconds=60)
    again = deferred(lambda: tries.operator(FIRST_FAILS, **limit).execute_complete(tries.context, event))
    assert (again.trigger.deadline, event["steps"]["deadline"]) == (deadline, deadline)


def test_a_deadline_that_passed_between_two_steps_submits_nothing(tries: Tries) -> None:
    event = first_end(tries)
    event["steps"]["deadline"] = datetime.now(UTC).timestamp() - 1
    with pytest.raises(AirflowTaskTimeout, match="before the next step was submitted"):
        tries.operator(FIRST_FAILS).execute_complete(tries.context, event)
    assert names(tries.server) == ["NAME"]


def test_a_deadline_that_passes_in_the_worker_stops_the_step(tries: Tries) -> None:
    event = first_end(tries)
    event["steps"]["deadline"] = datetime.now(UTC).timestamp() + 2
    operator = tries.operator("sleep 600", deferrable=False)
    with pytest.raises(AirflowTaskTimeout, match=r"execution_timeout passed before run \S+-s2 ended"):
        operator.execute_complete(tries.context, event)
    nothing_runs(tries)
    assert len(tries.runs()) == 2


def test_a_worker_that_is_lost_between_the_event_and_the_submission(
    tries: Tries, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = first_end(tries)

    def lose(*given: Any) -> Any:
        raise OSError("the worker is lost")

    with monkeypatch.context() as patch:
        patch.setattr(Submission, "obtain_next", lose)
        with pytest.raises(OSError, match="the worker is lost"):
            tries.operator(FIRST_FAILS).execute_complete(tries.context, event)
    assert len(tries.runs()) == 1
    tries.next_try()
    result = tries.execute("true", deferrable=False)
    assert names(tries.server) == ["NAME", "NAME-s2"]
    assert [one["exit_status"] for one in result["attempts"]] == [137, 0]


@pytest.mark.parametrize("moment", ["submission", "reply", "step 2"])
@pytest.mark.usefixtures("ended_by_a_user")
def test_a_kill_of_the_resumed_worker_leaves_nothing_running(tries: Tries, moment: str) -> None:
    event = first_end(tries)
    operator = tries.operator("sleep 600", deferrable=False)
    if moment != "step 2":
        tries.server.faults.slow(1.0)
    submissions = len(paths(tries.server, "/runs/apply"))

    def is_now() -> bool:
        if moment == "submission":
            return len(paths(tries.server, "/runs/apply")) > submissions
        return len(tries.server.runs) == 2

    def kill() -> None:
        wait_for(moment, is_now, look_every=0.01)
        operator.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DstackRunInterrupted):
        operator.execute_complete(tries.context, event)
    thread.join()
    tries.server.faults.clear()
    nothing_runs(tries)
    assert len(tries.runs()) <= 2


def test_a_kill_before_the_next_step_submits_nothing(tries: Tries) -> None:
    event = first_end(tries)
    operator = tries.operator(FIRST_FAILS)
    operator._killed = True
    with pytest.raises(DstackRunInterrupted, match="no further step was submitted"):
        operator.execute_complete(tries.context, event)
    assert names(tries.server) == ["NAME"]


def test_a_user_who_ends_the_task_in_step_2_stops_step_2(
    tries: Tries, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = first_end(tries)
    again = deferred(lambda: tries.operator("sleep 600").execute_complete(tries.context, event))
    monkeypatch.setattr("airflow_provider_dstack._stop.task_state", lambda ti: "failed")
    polls = len(paths(tries.server, "/runs/get"))
    asyncio.run(killed(trigger_of(tries, again), lambda: len(paths(tries.server, "/runs/get")) > polls + 2))
    nothing_runs(tries)
    assert tries.server.runs[1].name.endswith("-s2")
    assert len(paths(tries.server, "/runs/stop")) == 1


@pytest.mark.parametrize("durable", [True, False])
def test_a_deferral_that_times_out_stops_the_newest_step(tries: Tries, durable: bool) -> None:
    event = first_end(tries, durable=durable)
    given: dict[str, Any] = {"durable": durable, "execution_timeout": timedelta(seconds=900)}
    event["steps"]["deadline"] = datetime.now(UTC).timestamp() + 4
    again = deferred(lambda: tries.operator("sleep 600", **given).execute_complete(tries.context, event))
    timed_out = {"kind": "timed_out", "stopped": False, "steps": again.trigger.steps | {"run_name": "x-s2"}}
    with pytest.raises(AirflowTaskTimeout, match="passed before run x-s2 ended"):
        tries.operator("sleep 600", **given).execute_complete(tries.context, timed_out)
    nothing_runs(tries)
    # So does the trigger, whose deadline is that of the first.
    assert event_of(trigger_of(tries, again))["kind"] in ("timed_out", "finished")


def test_a_triggerer_that_takes_over_in_step_2_repeats_no_line(
    tries: Tries,
    xcoms: dict[str, Any],  # noqa: F811
    log: Log,  # noqa: F811
    tmp_path: Path,
) -> None:
    event, gate = first_end(tries), tmp_path / "gate"
    work = f"for i in 1 2 3 4 5 6; do echo row-$i; until [ $i -ne 3 -o -e {gate} ]; do sleep 0.1; done; done"
    again = deferred(lambda: tries.operator(f"sleep 1; {work}").execute_complete(tries.context, event))

    def is_kept() -> bool:
        kept = xcoms.get("dstack_progress") or {}
        is_of_step_2: bool = kept.get("marker") == again.trigger.marker
        return is_of_step_2 and kept["tail"][-1].endswith("row-3")

    asyncio.run(until(trigger_of(tries, again, log), is_kept))
    gate.touch()
    last = event_of(trigger_of(tries, again, log))
    result = tries.operator(work).execute_complete(tries.context, last)
    assert [one["number"] for one in result["attempts"]] == [1, 2]
    assert rows(log.lines) == [f"[attempt 2] row-{i}" for i in range(1, 7)]


class Calls(RunCallbacks):
    seen: list[str]

    def on_submitted(self, event: CallbackEvent) -> None:
        self.seen.append("submitted")

    def on_ended(self, event: CallbackEvent) -> None:
        assert event.outcome is not None
        self.seen.append(f"ended after {len(event.outcome.attempts)}")


def test_callbacks_hear_of_each_step_and_of_the_end_once(tries: Tries) -> None:
    Calls.seen = []
    given: dict[str, Any] = {"callbacks": f"{__name__}.Calls"}
    event = first_end(tries, **given)
    again = deferred(lambda: tries.operator(FIRST_FAILS, **given).execute_complete(tries.context, event))
    last = event_of(trigger_of(tries, again))
    tries.operator(FIRST_FAILS, **given).execute_complete(tries.context, last)
    assert Calls.seen == ["submitted", "submitted", "ended after 2"]


def test_an_event_of_a_task_that_had_no_fallbacks_ends_its_job(server: LocalServer) -> None:
    """The DAG got them while the task was deferred."""
    tries = Tries(server, Store(), **{**GIVEN, "fallbacks": None, "fallback_on_exit": None})
    event = first_end(tries)
    assert "steps" not in event
    operator: DstackRunOperator = tries.operator(fallbacks=GIVEN["fallbacks"], fallback_on_exit={137: "next"})
    with pytest.raises(DstackError, match="137"):
        operator.execute_complete(tries.context, event)
    assert len(tries.runs()) == 1
