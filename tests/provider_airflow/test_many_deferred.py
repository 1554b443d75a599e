"""Many deferred tasks at once: few requests, and each run is stopped when all are ended together."""

from __future__ import annotations

import time

import pytest

from airflow_provider_dstack._compat import trigger_has_on_kill
from dstack_core import Progress, RetryPolicy
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import paths, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.long]

# The scheduler defers tasks by itself since Airflow 3.3; before, each takes a worker first.
_MANY = 200 if trigger_has_on_kill() else 40
_DAG = '''
"""Tasks that are deferred, by the scheduler itself where it can, each for a run that is there already."""

from airflow.sdk import DAG
from airflow.sdk import BaseOperator
from airflow.triggers.base import StartTriggerArgs
from airflow_provider_dstack.triggers import DstackRunTrigger

RUNS = {runs!r}


class Watch(BaseOperator):
    start_from_trigger = True

    def __init__(self, trigger_kwargs, **kwargs):
        super().__init__(**kwargs)
        self.start_trigger_args = StartTriggerArgs(
            trigger_cls="airflow_provider_dstack.triggers.DstackRunTrigger",
            trigger_kwargs=trigger_kwargs,
            next_method="execute_complete",
        )

    def execute(self, context):
        self.defer(
            trigger=DstackRunTrigger(**self.start_trigger_args.trigger_kwargs), method_name="execute_complete"
        )

    def execute_complete(self, context, event):
        return event


with DAG("many", schedule=None, max_active_tasks={number}):
    for number, kwargs in enumerate(RUNS):
        Watch(task_id=f"watch-{{number}}", trigger_kwargs=kwargs)
'''


def test_many_deferred_tasks_need_few_requests(components: Components, shared_server: LocalServer) -> None:
    interval = 5.0
    with shared_server.client() as client:
        runs = [
            client.runs.submit(
                {"type": "task", "commands": ["true"], "resources": {"gpu": 99}},
                run_name=f"many-{number}",
                marker=f"many:{number}",
                retry_policy=RetryPolicy(retry=True, limit="1h"),
            )
            for number in range(_MANY)
        ]
        arguments = [
            {
                "dstack_conn_id": "dstack_default",
                "project_name": None,
                "run_name": run.name,
                "marker": run.marker,
                "progress": Progress(run.name, run.id).to_dict(),
                "poll_interval": interval,
            }
            for run in runs
        ]
        path = components.home / "dags" / "many.py"
        path.write_text(_DAG.format(runs=arguments, number=_MANY))
        wait_for("DAG of many tasks", lambda: components.knows("many"))
        dag_run = components.trigger("many")

        def all_deferred() -> bool:
            path = f"/api/v2/dags/many/dagRuns/{dag_run}/taskInstances?limit=1&state=deferred"
            return bool(components.call("GET", path)["total_entries"] == _MANY)

        def watched() -> bool:
            logs = (components.home / "logs" / "dag_id=many").rglob("*.trigger.*")
            return sum("Run many-" in log.read_text() for log in logs) == _MANY

        wait_for("deferred tasks", all_deferred, 180)
        wait_for("first line of every trigger", watched, 180)
        lists, gets = len(paths(shared_server, "/runs/list")), len(paths(shared_server, "/runs/get"))
        started = time.monotonic()
        wait_for("polls", lambda: len(paths(shared_server, "/runs/list")) >= lists + 12, 120)
        rounds = (time.monotonic() - started) / interval + 1
        lists = len(paths(shared_server, "/runs/list")) - lists
        gets = len(paths(shared_server, "/runs/get")) - gets
        # A poll of all runs takes a page for each hundred; a run that misses the round is polled alone.
        assert lists + gets < rounds * _MANY / 10
        stops = len(paths(shared_server, "/runs/stop"))
        components.set_run_state("many", dag_run, "failed")
        wait_for("stop of every run", lambda: len(paths(shared_server, "/runs/stop")) >= stops + _MANY, 300)
        assert len(paths(shared_server, "/runs/stop")) == stops + _MANY
        path.unlink()
