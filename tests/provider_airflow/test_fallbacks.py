"""``fallbacks``: a task moves to other machines within its try, by runs of which one at most is alive."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dstack import operators
from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._previous_try import RECORD_KEY
from airflow_provider_dstack._submission import Submission
from airflow_provider_dstack.errors import (
    DstackError,
    DstackNoCapacity,
    DstackRunInterrupted,
    DstackSpotInterrupted,
    DstackUserError,
)
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core import CallbackEvent, RunCallbacks
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths, wait_for
from tests.provider_airflow.test_function_call import Decorated
from tests.provider_airflow.tries import Store, Tries

BOTH = pytest.mark.parametrize("deferrable", [False, True], ids=["sync", "deferrable"])
ON_DEMAND = [{"spot_policy": "on-demand"}]
TWO = [{"max_price": 50.0}, {"max_price": "60"}]


@pytest.fixture
def tries(server: LocalServer) -> Tries:
    return Tries(server, Store(), spot_policy="spot", fallbacks=ON_DEMAND)


def names(server: LocalServer) -> list[str]:
    """Return the names of all runs, each without what is generated."""
    return [re.sub(r"^.*train-[0-9a-z]{8}", "NAME", run.name) for run in server.runs]


@BOTH
def test_after_an_interruption_a_task_moves_to_on_demand(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    deferrable: bool,
) -> None:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 0.5)
    server.scenarios.interrupt_after(1.5, noticed_after=0)
    command = "for i in 1 2 3; do echo row-$i; sleep 1; done"
    ended = dag_runner.run(
        f"configuration=Task(commands=[{command!r}]), spot_policy='spot', fallbacks={ON_DEMAND!r}, "
        f"poll_interval=0.3, deferrable={deferrable}"
    )
    output = capfd.readouterr().out
    assert ended.task_state == "success"
    assert output.count("Pausing task as DEFERRED") == (2 if deferrable else 0)
    assert names(server) == ["NAME", "NAME-s2"]
    assert [run.configuration["spot_policy"] for run in server.runs] == ["spot", "on-demand"]
    first, second = server.runs
    assert second.marker == f"{first.marker}/step2"
    # Each line of each step once and in order; attempts count on.
    shown = re.findall(r"(?:\[attempt 2\] )?row-\d|Step 2 of 2: run \S+ with spot_policy=on-demand", output)
    step = f"Step 2 of 2: run {second.name} with spot_policy=on-demand"
    assert shown == ["row-1", "row-2", step, *(f"[attempt 2] row-{number}" for number in (1, 2, 3))]
    # The outcome is that of the last step, with what all of them took.
    assert ended.result["run_name"] == second.name
    assert [(one["number"], one["reason"]) for one in ended.result["attempts"]] == [
        (1, "interrupted_by_no_capacity"),
        (2, "done_by_runner"),
    ]
    costs = [run.cost for run in server.client().runs.list(all=True)]
    assert ended.result["cost"] == pytest.approx(sum(costs), abs=1e-4)
    assert ended.result["duration"] > 4
    assert paths(server, "/runs/stop") == []


def test_without_capacity_the_next_step_is_submitted_and_the_last_fails(tries: Tries) -> None:
    tries.server.scenarios.capacity_after(600)
    with pytest.raises(DstackNoCapacity):
        tries.execute(fallbacks=TWO)
    assert names(tries.server) == ["NAME", "NAME-s2", "NAME-s3"]
    # A template makes a text of a number.
    assert [run.configuration.get("max_price") for run in tries.server.runs] == [None, 50.0, 60.0]


def test_an_exit_status_leads_to_the_next_step(tries: Tries) -> None:
    work = 'test "$DSTACK_RUN_NAME" != "${DSTACK_RUN_NAME%-s2}" || exit 137'
    result = tries.execute(work, fallback_on_exit={"137": "next"})
    assert result["run_name"].endswith("-s2")
    assert [one["exit_status"] for one in result["attempts"]] == [137, 0]


def test_success_and_a_failure_by_itself_have_one_run(tries: Tries) -> None:
    tries.execute("true")
    assert tries.store is not None
    assert tries.store.get(RECORD_KEY) is None
    tries.next_try(cleared=True)
    with pytest.raises(DstackUserError):
        tries.execute("exit 3", fallback_on_exit={137: "next"})
    assert len(tries.runs()) == 2


def test_skip_on_exit_code_counts_at_the_end(tries: Tries) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    with pytest.raises(AirflowSkipException):
        tries.execute("exit 99", fallback_on_exit={99: "next"}, skip_on_exit_code=99)
    assert names(tries.server) == ["NAME", "NAME-s2"]


def test_a_chosen_name_is_that_of_all_tries(tries: Tries) -> None:
    tries.server.scenarios.interrupt_after(0.2, noticed_after=0, times=3)
    given: dict[str, Any] = {"run_name": "fit", "fallbacks": [{"max_price": 50.0}]}
    with pytest.raises(DstackSpotInterrupted):
        tries.execute("sleep 2", **given)
    tries.next_try()
    assert tries.execute("sleep 2", **given)["run_name"] == "fit-s2"
    assert sorted({run.name for run in tries.runs()}) == ["fit", "fit-s2"]


def test_a_function_falls_back(server: LocalServer) -> None:
    def fit(step: int) -> str:
        import os
        import sys

        if not os.environ["DSTACK_RUN_NAME"].endswith("-s2"):
            sys.exit(137)
        return f"fitted {step}"

    tried = Decorated(server, Store(), fallbacks=ON_DEMAND, fallback_on_exit={137: "next"})
    assert tried.call(fit, 7) == "fitted 7"
    assert names(server) == ["NAME", "NAME-s2"]


def test_the_result_of_the_last_step_is_returned(tries: Tries) -> None:
    work = 'echo "{\\"step\\": \\"$DSTACK_RUN_NAME\\"}" > $DSTACK_RESULT_FILE; case $DSTACK_RUN_NAME in *-s2);; *) exit 137;; esac'
    result: Any = tries.execute(work, fallback_on_exit={137: "next"}, returns="result")
    assert result["step"].endswith("-s2")


class Calls(RunCallbacks):
    seen: list[tuple[str, str]]

    def on_submitted(self, event: CallbackEvent) -> None:
        self.seen.append(("submitted", event.run_name[-3:]))

    def on_ended(self, event: CallbackEvent) -> None:
        self.seen.append(("ended", event.run_name[-3:]))


def test_callbacks_hear_of_each_step_and_of_the_end_once(tries: Tries) -> None:
    Calls.seen = []
    tries.execute(
        "case $DSTACK_RUN_NAME in *-s2) echo fine;; *) exit 137;; esac",
        fallback_on_exit={137: "next"},
        callbacks=Calls,
    )
    kinds = [kind for kind, _ in Calls.seen]
    assert kinds == ["submitted", "submitted", "ended"]
    assert [name for _, name in Calls.seen][1:] == ["-s2", "-s2"]


def test_max_cost_is_for_all_steps(tries: Tries) -> None:
    tries.server.scenarios.interrupt_after(1.5, noticed_after=0)
    tries.execute("sleep 3", max_cost="0.5")
    first, second = (float(run.configuration["env"]["DSTACK_MAX_COST"]) for run in tries.server.runs)
    cost = {run.name: run.cost for run in tries.runs()}[tries.server.runs[0].name]
    assert (first, cost > 0) == (0.5, True)
    assert second == pytest.approx(0.5 - cost, abs=1e-3)


def test_a_step_that_max_cost_does_not_pay_for_is_not_submitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.provider_airflow.support import connection_json

    with LocalServer(regions={"aws/us-east-1": 1.2, "gcp/us-west1": 3600.0}) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DSTACK_DEFAULT", connection_json(server))
        tries = Tries(server, Store(), backends="aws", max_cost=1.0, fallbacks=[{"backends": "gcp"}])
        for number in (1, 2):
            with pytest.raises(DstackError, match=r"no further step: max_cost: expected more than"):
                tries.execute("exit 137", fallback_on_exit={137: "next"})
            # The next try begins anew.
            assert names(server) == ["NAME"] * number
            tries.next_try()


@pytest.mark.parametrize(
    ("fallbacks", "on_exit", "text"),
    [
        ([{"env": {"A": "1"}}], None, r"^fallbacks\[0\]: expected options .* survive\), got 'env'"),
        ([{"max_cost": 3}], None, r"^fallbacks\[0\]: .* got 'max_cost'"),
        ([{"run_resources": "24GB.."}], None, r"^fallbacks\[0\]: .* got 'run_resources'"),
        ({"spot_policy": "spot"}, None, r"^fallbacks: expected a list of dicts"),
        ("on-demand", None, r"^fallbacks: expected a list of dicts"),
        ([*ON_DEMAND, {"survive": "soon"}], None, r"^fallbacks\[1\]: survive\.duration: expected"),
        (ON_DEMAND, {137: 3}, r"^fallback_on_exit: expected .* for 137, got 3"),
        (ON_DEMAND, {0: "next"}, r"^fallback_on_exit: expected exit statuses from 1 to 255"),
        (None, {137: "next"}, r"^fallback_on_exit: expected fallbacks with it, got none"),
    ],
)
def test_wrong_fallbacks_are_an_error_when_the_dag_is_parsed(fallbacks: Any, on_exit: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DstackRunOperator(
            task_id="train", configuration={"type": "task"}, fallbacks=fallbacks, fallback_on_exit=on_exit
        )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"fallbacks": [{"spot_policy": "cheap"}]}, r"^fallbacks\[0\]: spot_policy: expected"),
        ({"fallbacks": [{"max_price": -1}]}, r"^fallbacks\[0\]: max_price: expected USD per hour above 0"),
        ({"fallbacks": [{"backends": [1]}]}, r"^fallbacks\[0\]: backends: expected"),
        ({"fallbacks": [*ON_DEMAND, {"max_duration": "soon"}]}, r"max_duration"),
        ({"survive": "1h", "fallbacks": [{"retry_policy": True}]}, r"^fallbacks\[0\]: survive"),
        (
            {"configuration": {"type": "service", "commands": ["x"], "port": 80}},
            r"^fallbacks: expected .* a task with it, got that of a service",
        ),
    ],
)
def test_a_wrong_value_fails_the_task_before_anything_is_submitted(
    tries: Tries, given: Any, text: str
) -> None:
    with pytest.raises(AirflowFailException, match=text):
        tries.execute(**given)
    assert paths(tries.server, "/runs/apply") == []


@pytest.mark.parametrize("native", [False, True])
def test_fallbacks_are_templates(dag_runner: DagRunner, server: LocalServer, native: bool) -> None:
    """As a whole, or the values in them; without native rendering the whole is a text, read as YAML."""
    whole = "'{{ params.machines }}'" if native else "'{{ params.machines | tojson }}'"
    body = f"""
DstackRunOperator(
    task_id="whole", configuration=Task(commands=["exit 137"]), poll_interval=0.2,
    fallbacks={whole}, fallback_on_exit={{137: "next"}},
    params={{"machines": [{{"max_price": 40.0}}]}},
)
DstackRunOperator(
    task_id="values", configuration=Task(commands=["exit 137"]), poll_interval=0.2,
    fallbacks=[{{"max_price": "{{{{ params.price }}}}"}}], fallback_on_exit={{137: "{{{{ params.step }}}}"}},
    params={{"price": 50, "step": 2}},
)
dag.render_template_as_native_obj = {native}
"""
    dag_runner.run_tasks(body)
    steps = {run.marker.split("/")[2]: run for run in server.runs if run.marker.endswith("/step2")}
    assert {task: run.configuration["max_price"] for task, run in steps.items()} == {
        "whole": 40.0,
        "values": 50.0,
    }


def test_a_service_has_no_fallbacks() -> None:
    for given in ({"fallbacks": ON_DEMAND}, {"fallback_on_exit": {137: "next"}}):
        with pytest.raises(ValueError, match=r"^fallback\w+: expected None for a service, got"):
            DstackServiceOperator(task_id="serve", configuration={"type": "service"}, **given)


def killed_when(tries: Tries, moment: Callable[[], object], *commands: str, **given: Any) -> str:
    """Kill the task, as Airflow does, at a moment; return its error."""
    operator = tries.operator(*commands, **given)

    def kill() -> None:
        wait_for("moment to kill", moment, look_every=0.01)
        operator.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DstackRunInterrupted) as raised:
        operator.execute(tries.context)
    thread.join()
    tries.server.faults.clear()
    return str(raised.value)


def nothing_runs(tries: Tries) -> None:
    wait_for("end of all runs", lambda: all(run.outcome() for run in tries.runs()))


@pytest.mark.usefixtures("ended_by_a_user")
def test_a_kill_in_step_2_stops_step_2(tries: Tries) -> None:
    tries.server.scenarios.interrupt_after(0.2, noticed_after=0)

    def second() -> bool:
        return any(run.name.endswith("-s2") and run.raw_status == "running" for run in tries.runs())

    error = killed_when(tries, second, "sleep 600")
    assert "-s2" in error
    nothing_runs(tries)
    assert tries.runs()[0].raw_status == "terminated"
    assert names(tries.server) == ["NAME", "NAME-s2"]


@pytest.mark.usefixtures("ended_by_a_user")
@pytest.mark.parametrize("applied", [False, True], ids=["before it arrives", "its reply is late"])
def test_a_kill_while_the_next_step_is_submitted_leaves_nothing_running(tries: Tries, applied: bool) -> None:
    tries.server.scenarios.interrupt_after(0.2, noticed_after=0)

    def submits() -> bool:
        if len(tries.server.runs) == 1 and tries.server.runs[0].finished:
            # From now on each request takes a second, on its way or on the way back.
            tries.server.faults.slow(1.0)
        if applied:
            return len(tries.server.runs) == 2
        return len(paths(tries.server, "/runs/apply")) == 2

    killed_when(tries, submits, "sleep 600")
    nothing_runs(tries)
    assert len(tries.server.runs) <= 2


@pytest.mark.usefixtures("ended_by_a_user")
def test_a_kill_between_two_steps_submits_no_other(tries: Tries) -> None:
    tries.server.scenarios.interrupt_after(0.2, noticed_after=0)
    # The offers for step 2 take two seconds; that request creates nothing.
    plans = len(paths(tries.server, "/runs/get_plan"))

    def between() -> bool:
        if tries.server.runs and not tries.server.runs[0].finished:
            tries.server.faults.add("/runs/get_plan", delay=2.0)
        return len(paths(tries.server, "/runs/get_plan")) == plans + 2

    error = killed_when(tries, between, "sleep 600")
    assert "has ended, and no further step was submitted" in error
    assert names(tries.server) == ["NAME"]
    nothing_runs(tries)


def test_a_lost_reply_submits_no_step_twice(tries: Tries, monkeypatch: pytest.MonkeyPatch) -> None:
    obtain_next = Submission.obtain_next

    def lossy(self: Submission, submitter: Any) -> Any:
        for when in ("before", "after"):
            tries.server.faults.add("/runs/apply", drop=when)
        return obtain_next(self, submitter)

    monkeypatch.setattr(Submission, "obtain_next", lossy)
    tries.server.scenarios.interrupt_after(0.2, noticed_after=0)
    assert tries.execute("sleep 1")["run_name"].endswith("-s2")
    assert names(tries.server) == ["NAME", "NAME-s2"]
