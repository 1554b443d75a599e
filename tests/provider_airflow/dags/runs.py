"""DAGs for the tests with real components; the command comes from the DAG run's params."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from airflow_provider_dstack._compat import has_retry_policies
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.retry_policies import DstackRetryPolicy
from airflow_provider_dstack.sensors import DstackRunSensor
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core import Task


def one_task(dag_id: str, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params={"command": "true"}):
        DstackRunOperator(
            task_id="train",
            configuration=Task(commands=["{{ params.command }}"], env={"MAGIC_TOKEN": "open-sesame-77"}),
            poll_interval=0.5,
            **arguments,
        )


one_task("sync")
one_task("sync_keep", on_kill_action="keep")
one_task("deferred", deferrable=True, callbacks="tests.callback_journal.Journal")
one_task("deferred_deadline", deferrable=True, execution_timeout=timedelta(seconds=30))
one_task("deferred_timeout", deferrable=True, execution_timeout=timedelta(seconds=9))

with DAG("measured", schedule=None):
    DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": ["sleep 14"], "resources": {"gpu": "A100"}},
        poll_interval=0.5,
    )
for name, deferrable in (("bad_sync", False), ("bad_deferred", True)):
    with DAG(name, schedule=None, params={"price": "1"}):
        DstackRunOperator(
            task_id="train",
            configuration=Task(commands=["true"]),
            max_price="{{ params.price }}",
            deferrable=deferrable,
        )

# Without a policy where Airflow has none: the DAG file must be parsed.
policy: dict[str, Any] = (
    {"retry_policy": DstackRetryPolicy(delay={"capacity": timedelta(0)})} if has_retry_policies() else {}
)
for dag_id, wanted in (("policy_user", {}), ("policy_capacity", {"resources": {"gpu": "1000"}})):
    with DAG(dag_id, schedule=None):
        DstackRunOperator(
            task_id="train",
            configuration={"type": "task", "commands": ["exit 3"], **wanted},
            poll_interval=0.5,
            retries=2,
            retry_delay=timedelta(0),
            **policy,
        )

with DAG("mapped", schedule=None):
    DstackRunOperator.partial(task_id="train", poll_interval=0.5).expand(
        configuration=[
            {"type": "task", "commands": ["echo first"]},
            {"type": "task", "commands": ["echo second"]},
        ]
    )

with DAG("service", schedule=None, params={"command": "true"}):
    DstackServiceOperator(
        task_id="train",
        configuration={"type": "service", "port": 8418, "commands": ["{{ params.command }}"]},
        poll_interval=0.5,
    )

with DAG("sensor", schedule=None, params={"run_name": ""}):
    DstackRunSensor(
        task_id="train",
        run_name="{{ params.run_name }}",
        deferrable=True,
        poke_interval=0.5,
        timeout=600.0,
    )
