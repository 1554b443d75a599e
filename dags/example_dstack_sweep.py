"""Train the same model on GPUs of several sizes, one run each, and report the cheapest.

The runs are mapped tasks: they run side by side, and one that finds no machine does not affect the
others. Needs the connection ``dstack_default``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from airflow.sdk import DAG, task

from airflow_provider_dstack.operators import DstackRunOperator

MEMORY = ["16GB..", "24GB..", "80GB.."]

with DAG("example_dstack_sweep", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:
    train = DstackRunOperator.partial(
        task_id="train",
        configuration={
            "type": "task",
            "commands": ["echo training on $DSTACK_GPUS_NUM GPU", "sleep 1"],
        },
        max_duration="1h",
        deferrable=True,
        poll_interval=2.0,
        max_active_tis_per_dagrun=8,
    ).expand(run_resources=[{"gpu": {"memory": memory, "count": 1}} for memory in MEMORY])

    @task(trigger_rule="none_skipped")
    def cheapest(outcomes: Iterable[dict[str, Any]]) -> str:
        """Compare what the runs cost."""
        best = min(outcomes, key=lambda outcome: outcome["cost"])
        return f"{best['instance']} ({best['backend']}) did it for {best['cost']:g} USD"

    cheapest(train.output)  # type: ignore[arg-type]  # resolved when the task runs
