"""A DAG whose runs are part of a trace, of metrics and of a lineage; half of them fail, half are deferred."""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_dstack import operators
from airflow_provider_dstack.operators import DstackRunOperator

# The deferred tasks are handed over early.
operators._SYNC_SECONDS = 1.5

ASSET = "python3 -c \"import dstack_report; dstack_report.asset('s3://bucket/a/b.parquet')\""
SHOWN = "env | grep -E '^(TRACEPARENT|OPENLINEAGE_[A-Z_]*)=' || true"

with DAG("telemetry", schedule=None):
    for mode, deferrable in (("sync", False), ("deferred", True)):
        for end, status in (("ok", 0), ("bad", 3)):
            DstackRunOperator(
                task_id=f"{mode}_{end}",
                configuration={
                    "type": "task",
                    "commands": [SHOWN, ASSET, f"sleep {8 if deferrable else 3}", f"exit {status}"],
                },
                deferrable=deferrable,
                poll_interval=0.2,
            )
