"""A deferred task with Airflow's real components: its deadline after a clear, and one of two mapped ones."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import over, runs_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.matrix]


def at(task: dict[str, Any], field: str) -> float:
    return datetime.fromisoformat(task[field]).timestamp()


def test_a_cleared_deferred_task_gets_its_full_execution_timeout_again(
    components: Components, shared_server: LocalServer
) -> None:
    dag_run = components.trigger("deferred_deadline", command="sleep 600")
    first = components.wait_for_state("deferred_deadline", dag_run, "deferred")
    components.clear("deferred_deadline", dag_run)
    ended = components.wait_for_state("deferred_deadline", dag_run, "failed")
    assert ended["try_number"] == 2
    # The first try took some seconds, which the second is not charged with.
    assert at(ended, "start_date") > at(first, "start_date") + 4
    assert 29 < at(ended, "end_date") - at(ended, "start_date") < 60
    runs = runs_of(shared_server, f"airflow:deferred_deadline/{dag_run}/")
    assert [over(run).raw_status for run in runs] == ["terminated", "terminated"]


def test_marking_one_of_two_mapped_deferred_tasks_stops_only_its_run(
    components: Components, shared_server: LocalServer
) -> None:
    dag_run = components.trigger("mapped_deferred", command="sleep 600")
    path = f"/api/v2/dags/mapped_deferred/dagRuns/{dag_run}"

    def tasks() -> dict[int, dict[str, Any]]:
        found = components.call("GET", f"{path}/taskInstances")["task_instances"]
        return {task["map_index"]: task for task in found}

    def both_watched() -> bool:
        now = tasks()
        return set(now) == {0, 1} and all(
            task["state"] == "deferred" and task["triggerer_job"] for task in now.values()
        )

    wait_for("deferred tasks with a triggerer", both_watched, 120)
    runs = runs_of(shared_server, f"airflow:mapped_deferred/{dag_run}/")
    by_index = {(run.marker or "").split("/")[2]: run for run in runs}
    components.call("PATCH", f"{path}/taskInstances/train/1", {"new_state": "failed"})
    assert over(by_index["train[1]"]).raw_status == "terminated"
    assert by_index["train[0]"].refresh().outcome() is None
    assert tasks()[0]["state"] == "deferred"
    components.set_run_state("mapped_deferred", dag_run, "failed")
    assert over(by_index["train[0]"]).raw_status == "terminated"
