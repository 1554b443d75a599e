"""Train a small model on a machine that dstack finds, then report what it cost.

The server comes from the environment or ``~/.dstack/config.yml``. The script uses nothing but Python, so
that this flow also runs on the embedded server (``python -m dstack_core.local``), which has no GPU but
pretends to.
"""

from __future__ import annotations

from prefect import flow, task

from dstack_core import GPU, OutcomeDict, Resources, Task
from prefect_dstack import run_task, stop_dstack_runs

SHOW_MACHINE = """
if command -v nvidia-smi > /dev/null; then nvidia-smi -L; else echo "no NVIDIA driver on this machine"; fi
""".strip()

TRAIN = """
python3 -u - <<'END'
import os, random, time

random.seed(1)
samples = [(x / 50, 3 * x / 50 - 1 + random.gauss(0, 0.05)) for x in range(100)]
slope, offset = 0.0, 0.0

for epoch in range(1, int(os.environ["EPOCHS"]) + 1):
    for x, y in samples:
        error = slope * x + offset - y
        slope -= 0.02 * error * x
        offset -= 0.02 * error
    loss = sum((slope * x + offset - y) ** 2 for x, y in samples) / len(samples)
    print(f"epoch {epoch:2} loss {loss:.4f}")
    time.sleep(0.3)

print(f"the model is y = {slope:.2f} x {offset:+.2f}")
END
""".strip()

# Stops what the flow leaves running when it is cancelled or its process dies.
stop_runs = stop_dstack_runs()


@task(log_prints=True)
def report(outcome: OutcomeDict) -> str:
    """Report the cost of the training."""
    text = (
        f"{outcome['run_name']} ended as {outcome['status']} on {outcome['instance']} "
        f"({outcome['backend']}) after {outcome['duration']:.0f} s for {outcome['cost']:g} USD"
    )
    print(text)  # noqa: T201 - log_prints sends it to the flow run
    return text


@flow(on_cancellation=[stop_runs], on_crashed=[stop_runs])
def example_dstack_run(epochs: int = 8) -> OutcomeDict:
    """Train for some epochs and return the outcome of the run."""
    outcome = run_task(
        Task(commands=[SHOW_MACHINE, TRAIN], python="3.11", env={"EPOCHS": str(epochs)}),
        resources=Resources(gpu=GPU(count=1, memory="16GB")),
        max_price=2.0,
        max_duration="1h",
        poll_interval=2.0,
    )
    report(outcome)
    return outcome


if __name__ == "__main__":
    example_dstack_run()
