"""Give a run a secret of Airflow's without its value standing in the run's environment.

The group's first task makes a secret of the dstack project from an Airflow variable, the run gets a reference
to it, and the last task deletes it, also if the run failed. Needs the connection ``dstack_default``, and the
Airflow variable ``hf_token`` unless its default is enough.
"""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.project_secrets import dstack_secrets
from dstack_core import Task

DOWNLOAD = Task(commands=["echo downloading with a token of ${#HF_TOKEN} characters"])

with (
    DAG("example_dstack_secrets", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag,
    dstack_secrets({"HF_TOKEN": "{{ var.value.get('hf_token', 'hf_example') }}"}) as secrets,
):
    DstackRunOperator(
        task_id="download",
        configuration=DOWNLOAD,
        env=secrets.env,  # type: ignore[arg-type]  # Airflow fills in the value
    )
