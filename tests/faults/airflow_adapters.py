"""The Airflow operator: waiting in the worker, and deferred to its trigger, in this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import tempfile
from types import SimpleNamespace
from typing import Any

for _name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
    del os.environ[_name]
_HOME = tempfile.TemporaryDirectory(prefix="airflow-home-")
# Set the environment before the import, because Airflow reads it then.
os.environ.update({"AIRFLOW_HOME": _HOME.name, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"})

from airflow_provider_dstack import _stop, _submission, operators  # noqa: E402
from airflow_provider_dstack.operators import DstackRunOperator  # noqa: E402
from tests.faults.case import Adapter, Case, Ended, lines_in  # noqa: E402
from tests.provider_airflow.versions import TaskDeferred  # noqa: E402

# Seconds. The operator requests offers before it submits; 0.1 s is its shortest poll interval.
_POLL_INTERVAL = 0.1
# Three repeats of a dropped stop would need 20 s, but no fault of these parts drops a stop.
_STOP_SECONDS = 6.0
_NUMBERS = itertools.count(1)


class _Lines:
    """A substitute for a task's log, which keeps the run's lines and all other messages."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.other_lines: list[str] = []

    def log(self, level: int, text: str, *arguments: object) -> None:
        message = text % arguments if arguments else text
        lines = lines_in(message)
        self.found += lines
        if not lines:
            self.other_lines.append(message)

    def info(self, text: str, *arguments: object) -> None:
        self.log(20, text, *arguments)

    debug = warning = error = exception = info


def _operator(case: Case, *, deferrable: bool) -> tuple[DstackRunOperator, _Lines]:
    number = next(_NUMBERS)
    # Without this, a plan that arrives byte by byte takes longer than all other requests of a life.
    _submission.PLAN_SECONDS = case.timeout
    # On a server that never answers again, each stop takes this long. The part latency uses the real value.
    _stop._LEAST_STOP_SECONDS = _STOP_SECONDS
    connection = {
        "conn_type": "dstack",
        "host": case.url,
        "login": case.project,
        "password": case.token,
        "extra": {"timeout": case.timeout},
    }
    os.environ[f"AIRFLOW_CONN_FAULTS_{number}"] = json.dumps(connection)
    operator = DstackRunOperator(
        task_id=f"train_{number}",
        configuration=case.task,
        run_name=case.name,
        dstack_conn_id=f"faults_{number}",
        poll_interval=max(_POLL_INTERVAL, case.poll_interval),
        retry_budget=case.budget,
        deferrable=deferrable,
        durable=False,
        log_budget_bytes=None,
    )
    lines = _Lines()
    operator._cached_logger = lines  # type: ignore[assignment]  # only what the operator uses of a logger
    return operator, lines


def _context(case: Case) -> Any:
    names = {"dag_id": "d", "run_id": "r", "task_id": case.name, "map_index": -1, "id": case.name}
    return {"ti": SimpleNamespace(**names, try_number=1, max_tries=0)}


def execute_sync(case: Case) -> Ended:
    """Execute the operator until its run has ended."""
    operator, lines = _operator(case, deferrable=False)
    try:
        result = operator.execute(_context(case))
    except Exception as error:
        return Ended(lines.found, None, error, lines.other_lines)
    return Ended(lines.found, result["status"], None, lines.other_lines)


def execute_deferred(case: Case) -> Ended:
    """Execute the operator until it defers, then its trigger, then the method that gets the trigger's event."""
    operator, lines = _operator(case, deferrable=True)
    context = _context(case)
    try:
        try:
            result = operator.execute(context)
        except TaskDeferred as deferral:
            trigger: Any = deferral.trigger
            trigger._log = lines
            trigger.not_before = 0.0

            async def event() -> Any:
                return (await anext(trigger.run())).payload

            result = operator.execute_complete(context, asyncio.run(event()))
    except Exception as error:
        return Ended(lines.found, None, error, lines.other_lines)
    return Ended(lines.found, result["status"], None, lines.other_lines)


# Otherwise a run of this length would end before the operator defers.
operators._SYNC_SECONDS = 0.0
# A task without a next try stops the run that it can no longer follow, if the server answers.
ADAPTERS = {
    "Airflow operator, sync": Adapter(execute_sync, "stops"),
    "Airflow operator, deferred": Adapter(execute_deferred, "stops"),
}
