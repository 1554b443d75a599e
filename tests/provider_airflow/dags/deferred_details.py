"""DAGs for the details of deferred tasks; the command comes from the DAG run's params."""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_dstack.operators import DstackRunOperator

with DAG("mapped_deferred", schedule=None, params={"command": "true"}):
    DstackRunOperator.partial(task_id="train", poll_interval=0.5, deferrable=True).expand(
        configuration=[{"type": "task", "commands": ["{{ params.command }}"]}] * 2
    )
