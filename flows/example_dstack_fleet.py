"""Prepare and train on one warm machine: a fleet for the time of a flow run.

The server comes from the environment or ``~/.dstack/config.yml``. The machine is created for the first run,
used by the second without a wait, and deleted with the fleet.
"""

from __future__ import annotations

from prefect import flow

from dstack_core import FleetConfiguration, OutcomeDict, Task
from prefect_dstack import dstack_fleet, run_task, stop_dstack_runs

# Deletes the fleet, too, when the flow run is cancelled or its process dies.
stop_runs = stop_dstack_runs()

FLEET = FleetConfiguration(name="warm", nodes="0..1", resources="16GB..", idle_duration="15m")
PREPARE = Task(name="prepare", commands=["echo preparing"])
TRAIN = Task(name="train", commands=["echo training"])


@flow(on_cancellation=[stop_runs], on_crashed=[stop_runs])
def example_dstack_fleet() -> list[OutcomeDict]:
    """Run two steps on the same machine, and return their outcomes."""
    with dstack_fleet(FLEET):
        return [run_task(step, max_duration="1h", poll_interval=2.0) for step in (PREPARE, TRAIN)]


if __name__ == "__main__":
    example_dstack_fleet()
