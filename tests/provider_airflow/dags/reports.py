"""DAGs of runs that report many messages, each of which is noted in a journal."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from dstack_core import Task
from tests.provider_airflow.report_journal import JournalledOperator


def one_task(dag_id: str, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params={"command": "true"}):
        JournalledOperator(
            task_id="train",
            configuration=Task(commands=["{{ params.command }}"]),
            poll_interval=5.0,
            **arguments,
        )


one_task("reporting", retries=1, retry_delay=timedelta(0))
one_task("reporting_deferred", deferrable=True)
