"""A DAG whose runs report; the commands come from the DAG run's params."""

from __future__ import annotations

from airflow.sdk import DAG, Asset

from airflow_provider_dstack.operators import DstackRunOperator

with DAG("reports", schedule=None, params={"train": "true", "refresh": "true"}):
    DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": ["{{ params.train }}"]},
        returns="result",
        outlets=[Asset("s3://models/classifier.pt")],
        poll_interval=0.5,
    )
    DstackRunOperator(
        task_id="refresh",
        configuration={"type": "task", "commands": ["{{ params.refresh }}"]},
        poll_interval=0.5,
    )
