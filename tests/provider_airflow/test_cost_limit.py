"""``max_cost`` of a task: its run is stopped there, and the task fails without another try."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

import dstack_core._flow.cost_limit as limits
from airflow_provider_dstack import operators
from airflow_provider_dstack.errors import DstackCostLimitReached
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths
from tests.provider_airflow.test_results import MODES, arguments
from tests.provider_airflow.tries import Store, Tries

# Three seconds on the server of these tests.
LIMIT = 0.001


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow so low a limit, and defer early; ``dag.test()`` has no race with the scheduler."""
    monkeypatch.setattr(limits, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.5)


@MODES
def test_the_task_fails_at_its_limit_and_is_not_tried_again(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str], deferrable: bool
) -> None:
    ended = dag_runner.run(arguments(deferrable, "echo started", "sleep 300", max_cost=LIMIT, retries=2))
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert ("Pausing task as DEFERRED" in output) is deferrable
    assert "was stopped at its cost limit (it cost 0.001" in output
    assert "and max_cost is 0.001 USD)" in output
    assert "limit.max_cost" in output
    (run,) = server.client().runs.list(all=True)
    outcome = run.outcome()
    assert outcome is not None
    assert outcome.category == "limit.max_cost"
    assert run.env["DSTACK_MAX_COST"] == "0.001"


@MODES
def test_a_task_below_its_limit_succeeds(
    dag_runner: DagRunner, server: LocalServer, deferrable: bool
) -> None:
    assert dag_runner.run(arguments(deferrable, "echo started", max_cost="1.5")).task_state == "success"
    assert paths(server, "/runs/stop") == []


def test_the_error_is_one_that_airflow_does_not_retry(server: LocalServer) -> None:
    tries = Tries(server, Store())
    with pytest.raises(DstackCostLimitReached, match="stopped at its cost limit") as raised:
        tries.execute("sleep 300", max_cost=LIMIT)
    assert isinstance(raised.value, AirflowFailException)
    assert raised.value.category == "limit.max_cost"


def test_nothing_is_submitted_where_the_price_is_not_known(server: LocalServer) -> None:
    tries = Tries(server, Store())
    with pytest.raises(AirflowFailException, match=r"^max_cost: expected machines with a price"):
        tries.execute("true", max_cost=5, run_resources="H200:8")
    assert server.client().runs.list(all=True) == []


@pytest.mark.parametrize("wrong", [0, -1, True, "much", [1]])
def test_a_wrong_limit_is_an_error_when_the_dag_is_parsed(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^max_cost: expected USD above 0, got"):
        DstackRunOperator(
            task_id="train", configuration={"type": "task", "commands": ["true"]}, max_cost=wrong
        )
    template = "{{ params.budget }}"
    given = {"type": "task", "commands": ["true"]}
    assert DstackRunOperator(task_id="t", configuration=given, max_cost=template).max_cost == template
