"""What Airflow's scheduler, its worker and its users do to one DAG run; each function runs in a process of its own.

A scheduler would poll its database for all DAG runs. Here a process drives one DAG run: it asks the DAG run what
may run next, as the scheduler does, and supervises each task as an executor does, in a process of the task's own.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from airflow import settings
from airflow.api.common.mark_tasks import set_dag_run_state_to_failed
from airflow.executors.base_executor import BaseExecutor
from airflow.executors.executor_loader import ExecutorLoader
from airflow.executors.workloads import BundleInfo, ExecuteTask
from airflow.models.dagbag import DBDagBag
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import clear_task_instances
from airflow.sdk import timezone
from airflow.utils.state import DagRunState, TaskInstanceState
from airflow.utils.types import DagRunTriggeredByType, DagRunType
from sqlalchemy import select

# A task's process starts with what its supervisor has imported.
from airflow_provider_dstack import _task_run, fleet_operators, operators  # noqa: F401

# A task in these states has no process any more once its supervisor has returned.
_LOST = (TaskInstanceState.QUEUED, TaskInstanceState.RUNNING, TaskInstanceState.RESTARTING)
_ENDED = (DagRunState.SUCCESS, DagRunState.FAILED)
_PAUSE = 0.2


def drive(dag_id: str, run_id: str, log: str) -> None:
    """Run a DAG run to its end, from where an earlier process left it; the first one creates it."""
    _own_session(log)
    session, dag = _opened(dag_id)
    if _dag_run(session, run_id) is None:
        now = timezone.utcnow()
        dag.create_dagrun(
            run_id=run_id,
            run_after=now,
            run_type=DagRunType.MANUAL,
            triggered_by=DagRunTriggeredByType.TEST,
            state=DagRunState.RUNNING,
            start_date=now,
            session=session,
        )
        session.commit()
    _fail_lost(session, dag, run_id)
    executor = ExecutorLoader.get_default_executor()
    while (run := _dag_run(session, run_id)).state not in _ENDED:
        run.dag = dag
        run.state = DagRunState.RUNNING
        may_run, _ = run.update_state(session=session)
        run.schedule_tis(may_run, session=session)
        session.commit()
        waiting = [
            one for one in run.get_task_instances(session=session) if one.state == TaskInstanceState.SCHEDULED
        ]
        for task in waiting:
            task.state = TaskInstanceState.QUEUED
            workload = ExecuteTask.make(
                task, generator=executor.jwt_generator, bundle_info=BundleInfo(name="dags-folder")
            )
            session.commit()
            _write(f"{run_id}: {task.task_id}, try {task.try_number}")
            try:
                BaseExecutor.run_workload(workload, subprocess_logs_to_stdout=True)
            except Exception as error:
                _write(f"{task.task_id}: {error!r}")
            _fail_lost(session, dag, run_id)
        if not waiting:
            time.sleep(_PAUSE)
        session.expire_all()


def fail(dag_id: str, run_id: str, log: str) -> None:
    """Mark the DAG run failed, as a user does: its teardown still runs."""
    _own_session(log)
    session, dag = _opened(dag_id)
    set_dag_run_state_to_failed(dag=dag, run_id=run_id, commit=True, session=session)
    session.commit()


def clear(dag_id: str, run_id: str, log: str) -> None:
    """Clear all tasks of the DAG run, as a user does."""
    _own_session(log)
    session, _ = _opened(dag_id)
    tasks = _dag_run(session, run_id).get_task_instances(session=session)
    clear_task_instances(tasks, session)
    session.commit()


def abandon(dag_id: str, run_id: str, log: str) -> None:
    """End the DAG run and its tasks as failed, the teardown too, without a process of them."""
    _own_session(log)
    session, _ = _opened(dag_id)
    run = _dag_run(session, run_id)
    for task in run.get_task_instances(session=session):
        if task.state != TaskInstanceState.SUCCESS:
            task.set_state(TaskInstanceState.FAILED, session=session)
    run.set_state(DagRunState.FAILED)
    session.commit()


def _own_session(log: str) -> None:
    """Start a session, and append all output to a file."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _opened(dag_id: str) -> tuple[Any, Any]:
    database: Any = settings
    database.engine.dispose(close=False)
    session = database.Session()
    return session, DBDagBag().get_latest_version_of_dag(dag_id, session=session)


def _dag_run(session: Any, run_id: str) -> Any:
    return session.scalar(select(DagRun).where(DagRun.run_id == run_id))


def _fail_lost(session: Any, dag: Any, run_id: str) -> None:
    """Fail the tasks whose process was lost, as the scheduler does when it misses their heartbeats."""
    session.expire_all()
    for task in _dag_run(session, run_id).get_task_instances(session=session):
        if task.state in _LOST:
            task.task = dag.get_task(task.task_id)
            task.handle_failure("the task's process was lost", session=session)
    session.commit()
