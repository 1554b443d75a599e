"""Train a model as a task of a DAG: one operator, as with the Kubernetes one.

Needs the connection ``dstack_default``. The command uses nothing but a shell, so that this DAG also runs on
the embedded server (``python -m dstack_core.local``), which has no GPU but pretends to.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import GPU, Resources, Task

with DAG("example_dstack_train", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:
    train = DstackRunOperator(
        task_id="train",
        configuration=Task(
            image="python:3.11-slim",
            commands=[
                "echo training on the data of {{ dag_run.run_after | ds }}",
                "for epoch in 1 2 3; do echo epoch $epoch of $MODEL; sleep 0.2; done",
            ],
            env={"MODEL": "tiny"},
        ),
        run_resources=Resources(gpu=GPU(memory="16GB"), memory="8GB"),
        max_duration="1h",
        retries=2,
        execution_timeout=timedelta(hours=2),
    )
