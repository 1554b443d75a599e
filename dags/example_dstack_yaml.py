"""Run a dstack configuration file that lies beside the DAG, and wait for it in another task.

The file is the one that people use with ``dstack apply``; Airflow renders the templates in it. The sensor
stands for a DAG that waits for a run it did not start. Needs the connection ``dstack_default``.
"""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.sensors import DstackRunSensor

with DAG("example_dstack_yaml", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:
    train = DstackRunOperator(task_id="train", configuration="train.dstack.yml")
    wait = DstackRunSensor(
        task_id="wait",
        run_name="{{ ti.xcom_pull('train', key='dstack_run_name') }}",
        deferrable=True,
        timeout=3600,
    )
    train >> wait
