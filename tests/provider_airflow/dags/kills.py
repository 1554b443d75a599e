"""DAGs for the kill matrix; the command comes from the DAG run's params."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Task


def one_task(dag_id: str, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params={"command": "true"}):
        DstackRunOperator(
            task_id="train",
            configuration=Task(commands=["{{ params.command }}"]),
            poll_interval=0.5,
            **arguments,
        )


# What kills do to callbacks is seen in the file of these.
JOURNAL = "tests.callback_journal.Journal"
one_task("retried", retries=1, retry_delay=timedelta(0), callbacks=JOURNAL)
# An Airflow outage costs tries: each one that starts during it fails before its task runs.
one_task("many_tries", retries=8, retry_delay=timedelta(seconds=10))
one_task("last_try", retry_budget=1.0, callbacks=JOURNAL)
one_task("lost_sight", retry_budget=1.0, retries=1, retry_delay=timedelta(seconds=5))
one_task("timed_out", execution_timeout=timedelta(seconds=8), retries=1, retry_delay=timedelta(hours=1))
one_task("relayed_again", deferrable=True, relay_log_again=True)
one_task("retried_deferred", deferrable=True, retries=1, retry_delay=timedelta(0))
# A busy Airflow costs tries: each one that starts too slowly fails before its task runs.
one_task("held", retries=4, retry_delay=timedelta(0), debug_on_failure=45)
one_task("held_deferred", deferrable=True, retries=4, retry_delay=timedelta(0), debug_on_failure=45)
one_task("held_before_retry", retries=4, retry_delay=timedelta(hours=1), debug_on_failure="10m")
