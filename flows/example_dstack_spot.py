"""Train on a spot machine, and survive that the cloud takes it away.

dstack starts the next attempt of the same run, so no retry of Prefect is used. The outcome lists the attempts.
"""

from __future__ import annotations

from prefect import flow

from prefect_dstack import run_task

TRAIN = """
# Continue from the last checkpoint of a volume here.
echo training
"""


@flow(log_prints=True)
def train_on_spot() -> int:
    """Train, and return how many attempts it took."""
    outcome = run_task(
        {"type": "task", "name": "spot", "commands": [TRAIN]},
        resources="16GB..",
        spot_policy="auto",
        survive={"duration": "8h", "times": 5},
        max_duration="4h",
        poll_interval=2.0,
    )
    for attempt in outcome["attempts"]:
        print(f"attempt {attempt['number']}: {attempt['reason']}, {attempt['cost']:.2f} USD")
    return len(outcome["attempts"])


if __name__ == "__main__":
    train_on_spot()
