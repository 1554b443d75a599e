"""Try the same training on GPUs of several sizes at once, and report the cheapest.

The server comes from the environment or ``~/.dstack/config.yml``. Each size is a run of its own; a size that
no machine has is left out of the comparison.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from dstack_core import GPU, OutcomeDict, Resources, Task
from prefect_dstack import run_task, stop_dstack_runs

TRAIN = """
python3 -u - <<'END'
total = 0.0
for step in range(1, 200_001):
    total += 1 / step
print(f"trained to {total:.3f}")
END
""".strip()

# Stops what the flow leaves running when it is cancelled or its process dies.
stop_runs = stop_dstack_runs()
# Each run is watched by a thread: this many at once.
runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=8)


@task
def compare(outcomes: list[OutcomeDict]) -> OutcomeDict | None:
    """Show the outcomes as a table and return the cheapest, or None if all runs failed."""
    ranked = sorted(outcomes, key=lambda outcome: float(outcome["cost"]))
    rows = [
        {"instance": each["instance"], "duration": each["duration"], "cost": each["cost"]} for each in ranked
    ]
    create_table_artifact(rows, key="gpu-sweep")
    return ranked[0] if ranked else None


@flow(task_runner=runner, on_cancellation=[stop_runs], on_crashed=[stop_runs])  # type: ignore[arg-type]
def example_dstack_sweep(memories: tuple[str, ...] = ("16GB", "24GB", "40GB")) -> OutcomeDict | None:
    """Train on one GPU of each size and return the cheapest outcome."""
    futures = run_task.map(
        [Task(commands=[TRAIN], python="3.11") for _ in memories],
        resources=[Resources(gpu=GPU(count=1, memory=memory)) for memory in memories],
        max_price=2.0,
        max_duration="1h",
        poll_interval=2.0,
    )
    states = [future.wait() or future.state for future in futures]
    return compare([state.result() for state in states if state.is_completed()])


if __name__ == "__main__":
    example_dstack_sweep()
