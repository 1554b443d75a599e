"""Create a fleet for one DAG run, run its tasks on the same warm machine, and delete it.

The group's first task creates a fleet of at most two machines, its last one deletes it, also if a task in
between failed. Needs the connection ``dstack_default``.
"""

from __future__ import annotations

from airflow.sdk import DAG

from airflow_provider_dstack.fleets import dstack_fleet
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import FleetConfiguration, Task

MACHINES = FleetConfiguration(nodes="0..2", resources="8GB..", idle_duration="10m")

with (
    DAG("example_dstack_fleet", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag,
    dstack_fleet("gpus", MACHINES),
):
    prepare = DstackRunOperator(task_id="prepare", configuration=Task(commands=["echo prepared"]))
    train = DstackRunOperator(task_id="train", configuration=Task(commands=["echo trained"]))
    prepare >> train
