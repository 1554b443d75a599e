"""Stop runs that their tasks could not stop: the last line of defence.

A machine that goes down takes the worker with it, and nothing is left that could stop the run. Every quarter
of an hour ``reap`` stops the runs whose task has ended, and lists what it found. Needs the connection
``dstack_default``.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.sdk import DAG

from airflow_provider_dstack.reaper import DstackReapOperator

with DAG(
    "example_dstack_reap",
    schedule=timedelta(minutes=15),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["example", "dstack", "maintenance"],
    doc_md=__doc__,
) as dag:
    DstackReapOperator(
        task_id="reap",
        # A task stops its run itself; it has this long to do so.
        min_age=60,
        execution_timeout=timedelta(minutes=10),
    )
