"""DAGs with a fleet of their own, whose processes are killed: one without and one with a next try."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_dstack.fleets import dstack_fleet
from airflow_provider_dstack.operators import DstackRunOperator

# 3 s with lines.
_TASK = {"type": "task", "commands": ["for i in $(seq 15); do echo line-$i; sleep 0.2; done"]}

for _dag_id, _retries in (("fleet_last_try", 0), ("fleet_retried", 1)):
    _arguments = {"retries": _retries, "retry_delay": timedelta(0)}
    with DAG(_dag_id, schedule=None, default_args=_arguments), dstack_fleet("gpus", {"nodes": "0..1"}):
        DstackRunOperator(task_id="train", configuration=_TASK, poll_interval=0.5)
