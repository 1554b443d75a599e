"""Predict in a batch and announce the file as an asset, with the number of its rows.

DAGs that are scheduled on the asset find the run, its metrics and these metadata in the asset's event. The
command needs nothing but a shell: a run may also report by printing. Needs the connection
``dstack_default``.
"""

from __future__ import annotations

from airflow.sdk import DAG, Asset

from airflow_provider_dstack.operators import DstackRunOperator

PREDICTIONS = Asset("s3://predictions/latest.csv")

PREDICT = f"""
# Read the batch, predict, and upload the file here.
echo '::dstack::{{"kind": "metric", "rows_per_second": 1250}}'
echo '::dstack::{{"kind": "asset", "uri": "{PREDICTIONS.uri}", "metadata": {{"rows": 5000}}}}'
echo '{{"rows": 5000}}' > $DSTACK_RESULT_FILE
"""

with DAG("example_dstack_batch_inference", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:
    DstackRunOperator(
        task_id="predict",
        configuration={"type": "task", "commands": [PREDICT]},
        run_resources="16GB..",
        max_duration="1h",
        outlets=[PREDICTIONS],
        poll_interval=2.0,
    )
