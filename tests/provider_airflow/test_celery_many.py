"""Many tasks at once on a fleet of Celery workers: one run each, every line once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.provider_airflow.fleet import LONG_FLEET_TEST, Fleet
from tests.provider_airflow.fleet_runs import MappedRun, gate

pytestmark = LONG_FLEET_TEST


@pytest.mark.parametrize("dag_id", ["sync_40", "deferred_100"])
def test_many_mapped_tasks_have_one_run_each_and_every_line_once(
    fleet: Fleet, dag_id: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with gate(tmp_path / "gate") as closed:
        run = MappedRun(fleet, dag_id, closed.command)
        if dag_id.startswith("sync"):
            run.wait_for_runs("running", fleet.slots)
        else:
            run.wait_for_states("deferred")
            run.wait_until_shown()
    run.wait_for_states("success", seconds=600)
    run.assert_one_run_each()
    run.assert_logs()
    assert (run.requests("/runs/apply"), run.requests("/runs/stop")) == (run.number, 0)
    assert {task["try_number"] for task in run.tasks()} == {1}
    polls = {name: run.requests(f"/{name}") for name in ("runs/get", "runs/list", "logs/poll")}
    record_property("requests", ", ".join(f"{number} {name}" for name, number in polls.items()))
