"""Fine-tune a model and watch its loss while it trains; the next task gets the result.

The script reports metrics, progress, a checkpoint and the result with ``dstack_report``, which every run of
``DstackRunOperator`` can import. They are in the *XCom* tab of the task while it runs. Needs the connection
``dstack_default``, and runs on the embedded server (``python -m dstack_core.local``), too.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, task

from airflow_provider_dstack.operators import DstackRunOperator

FINE_TUNE = """
python3 -u - <<'END'
import math, time
import dstack_report

EPOCHS = 4
for epoch in range(1, EPOCHS + 1):
    loss = math.exp(-0.5 * epoch)
    dstack_report.metric(step=epoch, loss=loss, learning_rate=1e-4)
    dstack_report.progress(done=epoch, total=EPOCHS, text=f"epoch {epoch}")
    dstack_report.checkpoint(f"s3://models/tiny/{epoch}.pt", step=epoch)
    time.sleep(0.5)
dstack_report.result({"loss": round(loss, 3), "model": f"s3://models/tiny/{EPOCHS}.pt"})
END
"""

with DAG("example_dstack_fine_tune", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:
    fine_tune = DstackRunOperator(
        task_id="fine_tune",
        configuration={"type": "task", "commands": [FINE_TUNE], "python": "3.11"},
        run_resources="24GB..",
        max_duration="1h",
        returns="result",
        deferrable=True,
        poll_interval=2.0,
    )

    @task
    def register(result: dict[str, Any]) -> str:
        """Pass the model on, with its loss."""
        return f"{result['model']} has a loss of {result['loss']}"

    register(fine_tune.output)  # type: ignore[arg-type]  # resolved when the task runs
