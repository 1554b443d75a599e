"""A task of a real Airflow whose end is caused while its run is running, and the causes."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import psutil

import dstack_core as dstack
from tests.faults.latency import LatencyCase, NotReached
from tests.faults.latency_judge import Said
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import wait_for

OVER = ("success", "failed", "skipped", "up_for_retry", "removed")
LOOK_EVERY = 0.5
PATIENCE = 240.0
# After so many seconds without a request, the stop of the run is complete.
_QUIET_SECONDS = 6.0


@dataclass(frozen=True)
class EndedTask:
    """The task ``train`` of one DAG run, and the case it belongs to."""

    airflow: Components
    case: LatencyCase
    dag_id: str
    dag_run: str

    @property
    def state(self) -> str:
        return str(self.now()["state"])

    def now(self) -> dict[str, Any]:
        return self.airflow.task(self.dag_id, self.dag_run)

    def wait_for(self, *states: str) -> None:
        self.airflow.wait_for_state(self.dag_id, self.dag_run, *states, seconds=PATIENCE)

    def running(self, task_id: str = "train") -> dstack.Run:
        """Return the run of this DAG run's task once it is running."""
        marker = f"airflow:{self.dag_id}/{self.dag_run}/{task_id}/"

        def find() -> dstack.Run | None:
            # A task that has ended will not have a run any more.
            if task_id == "train" and self.state in OVER:
                raise NotReached(f"expected a running task, got {self.state}")
            active = self.case.client.runs.list()
            return next((run for run in active if (run.marker or "").startswith(marker)), None)

        return self.case.wait_for_run(find)

    def process(self) -> psutil.Process:
        return psutil.Process(self.now()["pid"])

    def said(self) -> list[Said]:
        """Return the records of all tries' logs."""
        tries = range(1, self.now()["try_number"] + 1)
        return [_said(one) for number in tries for one in self.airflow.log(self.dag_id, self.dag_run, number)]

    def wait_until_quiet(self) -> None:
        """Return once the server gets no more requests."""
        proxy = self.case.proxy

        def is_quiet() -> bool:
            last = proxy.requests[-1].time if proxy.requests else 0.0
            return proxy.is_idle and time.monotonic() - last > _QUIET_SECONDS

        wait_for("quiet server", is_quiet, PATIENCE, LOOK_EVERY)


def mark(state: str, task: EndedTask) -> None:
    task.airflow.set_state(task.dag_id, task.dag_run, state)


def clear(task: EndedTask) -> None:
    task.airflow.clear(task.dag_id, task.dag_run)


def fail_dag_run(task: EndedTask) -> None:
    task.airflow.set_run_state(task.dag_id, task.dag_run, "failed")


def terminate(task: EndedTask) -> None:
    supervisor = task.process().parent()
    assert supervisor is not None
    supervisor.terminate()


def break_off(task: EndedTask) -> None:
    task.case.proxy.answer_at_once["logs/poll"] = 503


def _said(record: Any) -> Said:
    if isinstance(record, str):
        return Said(logging.INFO, record)
    level = logging.getLevelNamesMapping().get(str(record.get("level", "info")).upper(), logging.INFO)
    return Said(level, " ".join(str(record[key]) for key in ("event", "error_detail") if record.get(key)))
