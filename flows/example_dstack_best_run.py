"""Train with several learning rates at once and return the best by what the runs report.

The server comes from the environment or ``~/.dstack/config.yml``. While a run is running, its progress and
metrics are in the artifacts of the flow run.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from dstack_core import OutcomeDict, Task
from prefect_dstack import run_task, stop_dstack_runs

# The file of a training; ``dstack_report`` is in every run, and writes nothing outside of one.
TRAIN = """
python3 - <<'END'
import os

import dstack_report

rate, weight, steps = float(os.environ["RATE"]), 0.0, 50
for step in range(1, steps + 1):
    weight -= rate * 2 * (weight - 3)
    dstack_report.metric(step=step, loss=(weight - 3) ** 2)
    dstack_report.progress(done=step, total=steps)
dstack_report.result({"rate": rate, "weight": weight})
END
""".strip()

# Stops what the flow leaves running when it is cancelled or its process dies.
stop_runs = stop_dstack_runs()
# Each run is watched by a thread: this many at once.
runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=8)


@task
def choose(outcomes: list[OutcomeDict]) -> dict[str, Any]:
    """Show all results as a table and return the one with the lowest loss."""
    ranked = sorted(outcomes, key=lambda outcome: float(outcome["metrics"]["loss"]))
    rows = [{**outcome["result"], "loss": outcome["metrics"]["loss"]} for outcome in ranked]
    create_table_artifact(rows, key="learning-rates")
    return rows[0]


@flow(task_runner=runner, on_cancellation=[stop_runs], on_crashed=[stop_runs])  # type: ignore[arg-type]
def example_dstack_best_run(rates: tuple[float, ...] = (0.001, 0.01, 0.1, 0.99)) -> dict[str, Any]:
    """Train once per learning rate and return the result with the lowest loss."""
    outcomes = run_task.map(
        [Task(name="train", commands=[TRAIN], python="3.11", env={"RATE": str(rate)}) for rate in rates],
        max_duration="1h",
        poll_interval=2.0,
    ).result()
    return choose(outcomes)


if __name__ == "__main__":
    example_dstack_best_run()
