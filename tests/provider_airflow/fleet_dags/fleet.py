"""DAGs for a fleet of Celery workers; the command comes from the DAG run's params."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Task


def mapped(dag_id: str, number: int, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params={"command": "true"}, max_active_tasks=200):
        DstackRunOperator.partial(
            task_id="train",
            configuration=Task(commands=["{{ params.command }}"]),
            **{"poll_interval": 2.0, **arguments},
        ).expand(env=[{"NUMBER": str(one)} for one in range(number)])


mapped("sync_6", 6)
mapped("sync_40", 40)
mapped("deferred_8", 8, deferrable=True)
mapped("deferred_20", 20, deferrable=True)
mapped("deferred_50", 50, deferrable=True)
mapped("deferred_100", 100, deferrable=True)
RETRIED: dict[str, Any] = {"retries": 3, "retry_delay": timedelta(seconds=5)}
mapped("sync_retried_8", 8, **RETRIED)
mapped("deferred_retried_40", 40, deferrable=True, **RETRIED)
mapped("timed_out_sync_4", 4, execution_timeout=timedelta(seconds=90))
mapped("timed_out_deferred_4", 4, deferrable=True, execution_timeout=timedelta(seconds=90))
