"""Train on a spot machine, and survive that the cloud takes it away.

dstack starts the next attempt of the same run, so no retry of Prefect is used. The outcome lists the
attempts.
"""

from __future__ import annotations

from prefect import flow

from prefect_dstack import run_task

TRAIN = """
# Continue from the last checkpoint of a volume here.
echo training
"""


@flow
def train_on_spot() -> list[str]:
    """Train, and return how each attempt ended."""
    outcome = run_task(
        {"type": "task", "name": "spot", "commands": [TRAIN]},
        resources="16GB..",
        spot_policy="auto",
        survive={"duration": "8h", "times": 5},
        max_duration="4h",
        poll_interval=2.0,
    )
    return [f"attempt {each['number']}: {each['reason']}" for each in outcome["attempts"]]


if __name__ == "__main__":
    train_on_spot()
