"""A task that never fits into its budget."""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_dstack.budgets import DstackBudget
from airflow_provider_dstack.operators import DstackRunOperator

with DAG("approval", schedule=None) as dag:
    train = DstackRunOperator(
        task_id="train", configuration={"type": "task", "commands": ["true"]}, max_cost=2, poll_interval=0.2
    )
    DstackBudget(max_cost=1, when_spent="approve").covers(train)
