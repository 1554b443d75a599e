"""DAGs with a fleet of their own, whose processes are killed."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_dstack.fleets import dstack_fleet
from airflow_provider_dstack.operators import DstackRunOperator

# 6 s with lines.
_LINES = "for i in $(seq 30); do echo line-$i; sleep 0.2; done"


def _with_fleet(dag_id: str, retries: int, command: str) -> None:
    arguments = {"retries": retries, "retry_delay": timedelta(0)}
    with DAG(dag_id, schedule=None, default_args=arguments), dstack_fleet("gpus", {"nodes": "0..1"}):
        task = {"type": "task", "commands": [command]}
        DstackRunOperator(task_id="train", configuration=task, poll_interval=0.5)


_with_fleet("fleet_last_try", 0, _LINES)
_with_fleet("fleet_retried", 1, _LINES)
# A run that would outlive all trials.
_with_fleet("fleet_endless", 0, f"{_LINES}; sleep 3600")
