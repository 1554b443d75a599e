"""The DAGs that ``airflow_host`` measures: each has one task called ``train``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, BaseOperator, task

from airflow_provider_dstack.operators import DstackRunOperator
from benchmarks.signalled import SignalledTrigger
from benchmarks.waiting_for_log import WaitingOperator
from dstack_core import Task

TICKING = "for i in $(seq 300); do date +tick-%s.%N; sleep 0.2; done"
SPEAKING = "awk 'BEGIN { for (i = 0; i < {{ params.lines }}; i++) printf \"line-%09d-%085d\\n\", i, 0 }'"
PARAMS: dict[str, Any] = {"lines": 1000, "file": ""}


class SignalledOperator(BaseOperator):
    """An operator that waits, and writes down the time at which Airflow kills it."""

    template_fields = ("file",)

    def __init__(self, *, file: str, deferrable: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.file = file
        self.deferrable = deferrable

    def execute(self, context: Any) -> None:
        """Sleep."""
        if self.deferrable:
            self.defer(trigger=SignalledTrigger(self.file), method_name="execute")
        time.sleep(300)

    def on_kill(self) -> None:
        """Write down the time."""
        Path(self.file).write_text(str(time.monotonic()))


def run(dag_id: str, command: str, **arguments: Any) -> None:
    """Define a DAG that runs a command on dstack."""
    with DAG(dag_id, schedule=None, params=PARAMS):
        DstackRunOperator(task_id="train", configuration=Task(commands=[command]), **arguments)


for name, deferrable in (("sync", False), ("deferred", True)):
    run(f"nothing_{name}", "true", deferrable=deferrable, poll_interval=1.0)
    run(f"ticking_{name}", TICKING, deferrable=deferrable, poll_interval=2.0)
    # The worker follows a run that ends within seconds to its end, deferrable or not.
    first = "sleep 10; " if deferrable else ""
    run(
        f"speaking_{name}",
        first + SPEAKING,
        deferrable=deferrable,
        poll_interval=1.0,
        log_budget_bytes=None,
    )
    run(f"sleeping_{name}", "sleep 300", deferrable=deferrable, poll_interval=1.0)

# The same as "speaking_deferred", with a trigger that relays the whole log before it fires.
with DAG("speaking_waiting", schedule=None, params=PARAMS):
    WaitingOperator(
        task_id="train",
        configuration=Task(commands=["sleep 10; " + SPEAKING]),
        deferrable=True,
        poll_interval=1.0,
        log_budget_bytes=None,
    )

with DAG("empty_operator", schedule=None):
    EmptyOperator(task_id="train")

with DAG("empty_task", schedule=None):

    @task(task_id="train")
    def nothing() -> None:
        """Do nothing."""

    nothing()

with DAG("logging_task", schedule=None, params=PARAMS):

    @task(task_id="train")
    def speak(**context: Any) -> None:
        """Log the same number of lines, each in a record of its own."""
        logger = logging.getLogger("benchmark")
        for number in range(int(context["params"]["lines"])):
            logger.info("line-%09d-%085d", number, 0)

    speak()

for name, deferrable in (("sync", False), ("deferred", True)):
    with DAG(f"signalled_{name}", schedule=None, params=PARAMS):
        SignalledOperator(task_id="train", file="{{ params.file }}", deferrable=deferrable)
