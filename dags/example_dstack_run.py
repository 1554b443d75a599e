"""Train a small model on a machine that dstack finds, then report what it cost.

Needs the connection ``dstack_default``. The script uses nothing but Python, so that this DAG also runs on
the embedded server (``python -m dstack_core.local``), which has no GPU but pretends to.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, Param, task

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import GPU, Resources, Task

SHOW_MACHINE = """
if command -v nvidia-smi > /dev/null; then nvidia-smi -L; else echo "no NVIDIA driver on this machine"; fi
"""

TRAIN = """
python3 -u - <<'END'
import os, random, time

random.seed(1)
samples = [(x / 50, 3 * x / 50 - 1 + random.gauss(0, 0.05)) for x in range(100)]
slope, offset = 0.0, 0.0

for epoch in range(1, int(os.environ["EPOCHS"]) + 1):
    for x, y in samples:
        error = slope * x + offset - y
        slope -= 0.05 * error * x
        offset -= 0.05 * error
    loss = sum((slope * x + offset - y) ** 2 for x, y in samples) / len(samples)
    print(f"epoch {epoch:2} loss {loss:.4f}")
    time.sleep(1)

print(f"the model is y = {slope:.2f} x {offset:+.2f}")
END
"""

with DAG(
    "example_dstack_run",
    schedule=None,
    tags=["example", "dstack"],
    params={"epochs": Param(8, type="integer", minimum=1, maximum=1000)},
    doc_md=__doc__,
) as dag:
    train = DstackRunOperator(
        task_id="train",
        configuration=Task(
            commands=[SHOW_MACHINE, TRAIN], python="3.11", env={"EPOCHS": "{{ params.epochs }}"}
        ),
        run_resources=Resources(gpu=GPU(count=1, memory="16GB")),
        max_price=2.0,
        max_duration="1h",
        deferrable=True,
        poll_interval=2.0,
    )

    @task
    def report(outcome: dict[str, Any]) -> str:
        """Sum up the run from the outcome that the operator returned."""
        text = (
            f"{outcome['run_name']} ended as {outcome['status']} on {outcome['instance']} "
            f"({outcome['backend']}) after {outcome['duration']:.0f} s for {outcome['cost']:g} USD"
        )
        print(text)  # noqa: T201 - Airflow shows what a task prints in its log
        return text

    report(train.output)  # type: ignore[arg-type]  # resolved when the task runs
