"""DAGs of tasks that are ended while the server is slow; each DAG run names its connection and its run."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, task

from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.services import DstackServiceOperator, DstackStopRunOperator

# On a server that takes 5 s for each reply, a run is running after 30 s, and then its log is read.
TIMEOUT = timedelta(seconds=50)
_PARAMS = {"connection": "dstack_default", "configuration": "type: task", "name": "none", "gate": "none"}


def one_task(dag_id: str, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params=_PARAMS):
        DstackRunOperator(
            task_id="train",
            configuration="{{ params.configuration }}",
            dstack_conn_id="{{ params.connection }}",
            poll_interval=0.5,
            **arguments,
        )


one_task("slow_ended", retries=1, retry_delay=timedelta(0))
one_task("slow_named", retries=1, retry_delay=timedelta(0), run_name="{{ params.name }}")
one_task("slow_last_try", retry_budget=1.0)
one_task("slow_timed_out", execution_timeout=TIMEOUT)
one_task("slow_deferred", deferrable=True, retries=1, retry_delay=timedelta(0))
one_task("slow_deferred_timed_out", deferrable=True, execution_timeout=TIMEOUT)


@task
def wait(gate: str) -> None:
    """Work between a setup and its teardown, until the gate exists."""
    while not Path(gate).exists():
        time.sleep(0.2)


with DAG("slow_teardown", schedule=None, params=_PARAMS):
    serve = DstackServiceOperator(
        task_id="serve",
        configuration="{{ params.configuration }}",
        dstack_conn_id="{{ params.connection }}",
        poll_interval=0.5,
    )
    # The tests read the state and log of the task with this id.
    stop = DstackStopRunOperator(
        task_id="train",
        runs_of=serve,
        dstack_conn_id="{{ params.connection }}",
        poll_interval=0.5,
        execution_timeout=timedelta(seconds=90),
    )
    serve >> wait("{{ params.gate }}") >> stop.as_teardown(setups=serve)
