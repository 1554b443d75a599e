"""A budget of a DAG run: a task that does not fit any more is refused or skipped, and nothing is submitted."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, exceptions

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._from_operator import SETTLE_SECONDS
from airflow_provider_dstack.budget_approval import DstackBudgetApprovalOperator
from airflow_provider_dstack.budgets import DstackBudget
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import DagRunner, wait_for
from tests.provider_airflow.versions import TaskDeferred

HITL = "airflow.providers.standard.operators.hitl"
HEAD = "from airflow_provider_dstack.budgets import DstackBudget"
BODY = """
def run(task_id, **options):
    given = {{"type": "task", "commands": ["sleep 1"]}}
    return DstackRunOperator(task_id=task_id, configuration=given, poll_interval=0.2, **options)

first, second = run("first", max_cost=0.05), run("second", max_cost={planned})
first >> second
DstackBudget(max_cost=0.05, when_spent={when_spent!r}).covers(first, second)
"""


@pytest.mark.parametrize(
    ("when_spent", "planned", "check", "state"),
    [
        ("fail", 0.05, "failed", "upstream_failed"),
        ("skip", 0.05, "skipped", "skipped"),
        ("fail", 0.04, "success", "success"),
    ],
)
def test_a_task_runs_while_it_fits(
    dag_runner: DagRunner,
    server: LocalServer,
    capfd: pytest.CaptureFixture[str],
    when_spent: str,
    planned: float,
    check: str,
    state: str,
) -> None:
    ran = dag_runner.run_tasks(BODY.format(when_spent=when_spent, planned=planned), HEAD)
    output = capfd.readouterr().out
    assert (ran.tasks["first"], ran.tasks["first_budget"]) == ("success", "success")
    assert (ran.tasks["second_budget"], ran.tasks["second"]) == (check, state)
    assert len(server.client().runs.list(all=True)) == (2 if state == "success" else 1)
    assert ran.values["first_budget"]["left"] == 0.05
    assert f"and the next run may cost {planned:.2f} USD." in output


@pytest.mark.parametrize("wrong", ["ask", None, True])
def test_a_wrong_choice_is_an_error_when_the_dag_is_parsed(wrong: Any) -> None:
    with pytest.raises(ValueError, match="when_spent"):
        DstackBudget(max_cost=5, when_spent=wrong)


@pytest.mark.parametrize("wrong", [0, -1, "x", None, True, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [DstackBudget, lambda max_cost: approval(0.1, max_cost=max_cost)])
def test_a_wrong_amount_is_an_error_when_the_dag_is_parsed(make: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="max_cost: expected USD above 0, got"):
        make(max_cost=wrong)


def approval(planned: float, **options: Any) -> DstackBudgetApprovalOperator:
    given = {"max_cost": 0.05, "planned": planned, **options}
    return DstackBudgetApprovalOperator(task_id="budget", **given)


CONTEXT: Any = {
    "ti": SimpleNamespace(dag_id="etl", run_id="r"),
    "task_instance": SimpleNamespace(id="0199"),
    "dag_run": None,
}


def test_a_task_that_does_not_fit_waits_for_approval(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[dict[str, Any]] = []
    monkeypatch.setattr(f"{HITL}.upsert_hitl_detail", lambda **request: requests.append(request))
    check = approval(planned=0.06, body="Ask the team.")
    # Airflow 3.3 awaits input, earlier ones defer.
    waiting: Any = getattr(exceptions, "TaskAwaitingInput", TaskDeferred)
    with pytest.raises(waiting) as caught:
        check.execute(CONTEXT)
    assert caught.value.method_name == "execute_complete"
    (request,) = requests
    assert request["options"] == ["Approve", "Reject"]
    assert request["subject"] == "A dstack run does not fit into its budget"
    assert request["body"] == (
        "Of the budget of 0.05 USD, 0.00 USD are spent by 0 runs, and the next run may cost 0.06 USD.\n\n"
        "Ask the team."
    )


def test_a_task_that_fits_needs_no_approval(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{HITL}.upsert_hitl_detail")
    assert approval(planned=0.05).execute(CONTEXT)["left"] == 0.05
    rendered = approval(planned=0.05, max_cost="{{ params.budget }}")
    rendered.max_cost = "much"
    with pytest.raises(AirflowFailException, match="max_cost"):
        rendered.execute(CONTEXT)
    server.faults.add("/runs/list", times=None, status=403)
    with pytest.raises(AirflowFailException):
        approval(planned=0.05).execute(CONTEXT)


def test_a_budget_puts_approvals_before_its_tasks() -> None:
    with DAG("etl"):
        train = DstackRunOperator(task_id="train", configuration={"type": "task"}, max_cost=20)
        asked = {"response_timeout": timedelta(hours=1), "fail_on_reject": True}
        (check,) = DstackBudget(50, when_spent="approve", approval=asked).covers(train)
    assert isinstance(check, DstackBudgetApprovalOperator)
    assert (check.task_id, check.max_cost, check.planned) == ("train_budget", 50, 20)
    assert (check.response_timeout, check.fail_on_reject) == (timedelta(hours=1), True)
    assert train.upstream_task_ids == {"train_budget"}
    with pytest.raises(ValueError, match="approval: expected when_spent=\"approve\" with it, got 'skip'"):
        DstackBudget(50, when_spent="skip", approval=asked)


@pytest.mark.slow
@pytest.mark.matrix
def test_a_person_decides_in_a_real_airflow(components: Components) -> None:
    chosen = {components.trigger("approval"): choice for choice in ("Approve", "Reject")}
    ends = {}
    for run_id in chosen:
        check = f"/api/v2/dags/approval/dagRuns/{run_id}/taskInstances/train_budget"
        wait_for("a request for approval", partial(_is_asked, components, check), 90)
    # The scheduler fails a task that resumes before it has seen the end of its first process.
    time.sleep(SETTLE_SECONDS)
    for run_id, choice in chosen.items():
        details = f"/api/v2/dags/approval/dagRuns/{run_id}/taskInstances/train_budget/-1/hitlDetails"
        assert "the next run may cost 2.00 USD" in components.call("GET", details)["body"]
        components.call("PATCH", details, {"chosen_options": [choice], "params_input": {}})
    for run_id, choice in chosen.items():
        components.wait_for_run_end("approval", run_id)
        ends[choice] = components.task("approval", run_id)["state"]
    assert ends == {"Approve": "success", "Reject": "skipped"}


def _is_asked(components: Components, check: str) -> bool:
    return components.call("GET", check)["state"] in ("awaiting_input", "deferred")
