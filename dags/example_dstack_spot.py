"""Train on a spot machine, and survive that the cloud takes it away.

dstack starts the next attempt of the same run, so no retry of Airflow is used. The outcome lists the
attempts, which the second task returns. Needs the connection ``dstack_default``.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, task

from airflow_provider_dstack.operators import DstackRunOperator

TRAIN = """
# Continue from the last checkpoint of a volume here.
echo training
"""

with DAG("example_dstack_spot", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:
    train = DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": [TRAIN]},
        run_resources="16GB..",
        spot_policy="auto",
        survive={"duration": "8h", "times": 5},
        max_duration="4h",
        deferrable=True,
        poll_interval=2.0,
    )

    @task
    def report(outcome: dict[str, Any]) -> list[str]:
        return [f"attempt {each['number']}: {each['reason']}" for each in outcome["attempts"]]

    report(train.output)  # type: ignore[arg-type]  # Airflow fills in the value
