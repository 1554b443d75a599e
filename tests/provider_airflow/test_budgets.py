"""A budget of a DAG run: a task that does not fit any more is refused or skipped, and nothing is submitted."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_dstack.budgets import DstackBudget
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner

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
