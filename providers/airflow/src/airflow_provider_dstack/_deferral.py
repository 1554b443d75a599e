"""Hand a run over to the triggerer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from airflow_provider_dstack import _checkpoint
from airflow_provider_dstack._stop import was_ended
from airflow_provider_dstack.errors import DstackRunInterrupted
from airflow_provider_dstack.triggers import DstackRunTrigger

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._task_run import TaskRun
    from airflow_provider_dstack.operators import DstackRunOperator

_BACKSTOP_SECONDS = 60.0
# A worker may report the end of a deferral five seconds late, and the scheduler read it a second later.
_SETTLE_SECONDS = 8.0


def defer(
    operator: DstackRunOperator, task_run: TaskRun, context: Context, was_killed: Callable[[], bool]
) -> NoReturn:
    """Defer the task until its run has ended.

    Raises ``DstackRunInterrupted`` when there is no run, or the task was ended: Airflow would refuse the
    deferral then, and the process would end without stopping the run.
    """
    if task_run.progress is None:
        raise DstackRunInterrupted(f"run {task_run.ref.name} was left before it was submitted")
    deadline = None
    if operator.execution_timeout is not None:
        # Airflow itself does not look at execution_timeout while a task is deferred.
        started = context["ti"].start_date.timestamp()
        deadline = started + operator.execution_timeout.total_seconds()
    trigger = DstackRunTrigger(
        dstack_conn_id=operator.dstack_conn_id,
        project_name=task_run.project,
        run_name=task_run.ref.name,
        marker=task_run.ref.marker,
        progress=task_run.progress.to_dict(),
        **task_run.relay.state(),
        poll_interval=operator.poll_interval,
        retry_budget=operator.retry_budget,
        deadline=deadline,
        not_before=time.time() + _SETTLE_SECONDS,
        get_logs=operator.get_logs,
        log_budget_bytes=operator.log_budget_bytes,
        on_kill_action=operator.on_kill_action,
    )
    with suppress(Exception):
        # Airflow complains about an XCom that is read before it was ever written.
        state = {"progress": trigger.progress, **task_run.relay.state()}
        _checkpoint.save(context["ti"], trigger.marker, state)
    left = None if deadline is None else max(0.0, deadline - time.time()) + _BACKSTOP_SECONDS
    # The last thing before: what happens between this and Airflow's answer is seen by nobody.
    if was_killed() or was_ended(context["ti"]):
        raise DstackRunInterrupted(f"the task was ended while run {task_run.ref.name} was handed over")
    operator.defer(
        trigger=trigger,
        method_name="execute_complete",
        timeout=None if left is None else timedelta(seconds=left),
    )
    raise RuntimeError("the task was not deferred")
