"""DAGs whose processes are killed during a request; the DAG run's params name the run and the connection."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_dstack import operators
from airflow_provider_dstack.operators import DstackRunOperator

# A kill may come at any of 16 requests; an early deferral makes some of them the triggerer's.
operators._SYNC_SECONDS = 1.5


def one_task(dag_id: str, *, deferrable: bool, poll_interval: float) -> None:
    params = {"connection": "dstack_default", "name": "none", "configuration": "type: task"}
    with DAG(dag_id, schedule=None, params=params):
        DstackRunOperator(
            task_id="train",
            configuration="{{ params.configuration }}",
            run_name="{{ params.name }}",
            dstack_conn_id="{{ params.connection }}",
            deferrable=deferrable,
            poll_interval=poll_interval,
            retries=2,
            retry_delay=timedelta(0),
        )


one_task("killed", deferrable=False, poll_interval=0.5)
one_task("killed_deferred", deferrable=True, poll_interval=1.0)
