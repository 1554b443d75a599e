"""The maintenance DAG of the tests with real components."""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_dstack.reaper import DstackReapOperator

with DAG("reaper", schedule=None):
    DstackReapOperator(task_id="train", min_age=3)
