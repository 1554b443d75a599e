"""Import what moved between Airflow 3.1 and 3.3; no other module asks which Airflow this is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from datetime import datetime

    from airflow.sdk import BaseHook, BaseOperator, Context, RetryDecision, RetryPolicy
    from airflow.sdk.configuration import conf
    from airflow.sdk.exceptions import (
        AirflowException,
        AirflowFailException,
        AirflowNotFoundException,
        AirflowRuntimeError,
        AirflowSkipException,
        AirflowTaskTimeout,
    )
else:
    from airflow.sdk import BaseOperator, Context
    from airflow.sdk.exceptions import AirflowRuntimeError

    try:
        from airflow.sdk import RetryDecision, RetryPolicy
    except ImportError:
        # Before Airflow 3.3. A policy can then not be made, so the base class has nothing to do.
        RetryDecision, RetryPolicy = None, object
    try:
        from airflow.sdk import BaseHook
    except ImportError:
        from airflow.hooks.base import BaseHook
    try:
        from airflow.sdk.configuration import conf
    except ImportError:
        from airflow.configuration import conf
    try:
        from airflow.sdk.exceptions import (
            AirflowException,
            AirflowFailException,
            AirflowNotFoundException,
            AirflowSkipException,
            AirflowTaskTimeout,
        )
    except ImportError:
        from airflow.exceptions import (
            AirflowException,
            AirflowFailException,
            AirflowNotFoundException,
            AirflowSkipException,
            AirflowTaskTimeout,
        )

__all__ = [
    "NO_STATUS",
    "AirflowException",
    "AirflowFailException",
    "AirflowNotFoundException",
    "AirflowRuntimeError",
    "AirflowSkipException",
    "AirflowTaskTimeout",
    "BaseHook",
    "BaseOperator",
    "Context",
    "DatabaseFacts",
    "ReaperFacts",
    "RetryDecision",
    "RetryPolicy",
    "TaskFacts",
    "TaskInstanceLike",
    "TaskStateStoreLike",
    "conf",
    "database_facts",
    "database_tasks",
    "deferral_errors",
    "delete_xcom",
    "find_task_state",
    "has_retry_policies",
    "host_name",
    "mask_secret",
    "pull_xcom",
    "push_xcom",
    "server_conf",
    "server_connection",
    "stats",
    "task_state",
    "task_state_store",
    "trigger_has_on_kill",
    "worker_task",
]


# How Airflow's pages call a task instance that has no state yet.
NO_STATUS = "no_status"


class TaskInstanceLike(Protocol):
    """What is used of a task instance; the worker's and the triggerer's classes differ."""

    @property
    def dag_id(self) -> str: ...
    @property
    def run_id(self) -> str: ...
    @property
    def task_id(self) -> str: ...
    @property
    def try_number(self) -> int: ...
    @property
    def map_index(self) -> int | None: ...


def task_state(ti: TaskInstanceLike) -> str | None:
    """Return the state of a task instance from the scheduler's database; "removed" when it no longer exists.

    None is a state, too: that of a task that waits to be scheduled.
    Blocks for some milliseconds; also works in a thread of the triggerer. Raises what Airflow raises when
    the question cannot be asked.
    """
    found = find_task_state(ti)
    if found is None:
        return "removed"
    return None if found == NO_STATUS else found


def find_task_state(ti: TaskInstanceLike) -> str | None:
    """Return the state of a task instance, ``NO_STATUS`` before it has one; None when Airflow has no such.

    Without a task id, any task instance of the DAG run will do. Blocks and raises as ``task_state`` does.
    """
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    mapped = ti.map_index is not None and ti.map_index >= 0
    states = RuntimeTaskInstance.get_task_states(
        dag_id=ti.dag_id,
        task_ids=[ti.task_id] if ti.task_id else None,
        run_ids=[ti.run_id],
        map_index=ti.map_index if mapped else None,
    )
    if not ti.task_id:
        return next(map(_word, states.get(ti.run_id, {}).values()), None)
    found, key = states.get(ti.run_id, {}), f"{ti.task_id}_{ti.map_index}" if mapped else ti.task_id
    return _word(found[key]) if key in found else None


class TaskFacts(NamedTuple):
    """What Airflow reports about a task instance and its DAG run; ``ended_at`` is None in a worker."""

    state: str
    ended_at: datetime | None
    dag_run_state: str
    dag_run_started_at: datetime | None


def worker_task(ti: TaskInstanceLike) -> TaskFacts | None:
    """Return what Airflow reports to a worker about a task instance of any DAG, None when there is no such.

    The Task SDK has no public way to the start of another DAG run, so this sends the message that Airflow's
    own asset events send; where that is missing (before Airflow 3.2) the start is None. Raises what Airflow
    raises when the question cannot be asked.
    """
    from airflow.sdk.execution_time import comms, task_runner

    state, question = find_task_state(ti), getattr(comms, "GetDagRun", None)
    if state is None:
        return None
    # Without the start, ownership cannot be proven, and the run is left alone.
    if question is None:
        return TaskFacts(state, None, NO_STATUS, None)
    dag_run: Any = task_runner.SUPERVISOR_COMMS.send(question(dag_id=ti.dag_id, run_id=ti.run_id))
    return TaskFacts(state, None, _word(dag_run.state), dag_run.start_date)


@contextmanager
def database_tasks() -> Iterator[Callable[[TaskInstanceLike], TaskFacts | None]]:
    """Yield a function that reads task instances from Airflow's database, as Airflow's own commands do.

    For the command line alone: workers and triggerers have no database. Raises SQLAlchemy's errors, here
    already when the database does not answer.
    """
    from airflow.models import DagRun, TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import func, select

    with create_session() as session:

        def find(ti: TaskInstanceLike) -> TaskFacts | None:
            index = -1 if ti.map_index is None else ti.map_index
            own = (TaskInstance.task_id == ti.task_id, TaskInstance.map_index == index)
            row = session.execute(
                select(
                    TaskInstance.state,
                    # A state that was not reached by running has no end of its own.
                    func.coalesce(TaskInstance.end_date, TaskInstance.updated_at),
                    DagRun.state,
                    DagRun.start_date,
                )
                .join(TaskInstance.dag_run)
                .where(
                    TaskInstance.dag_id == ti.dag_id,
                    TaskInstance.run_id == ti.run_id,
                    # Without a task id, any task instance of the DAG run will do.
                    *(own if ti.task_id else ()),
                )
                .limit(1)
            ).one_or_none()
            return None if row is None else TaskFacts(_word(row[0]), row[1], _word(row[2]), row[3])

        session.execute(select(1))
        yield find


class ReaperFacts(NamedTuple):
    """What Airflow's database has of a DAG in which a ``DstackReapOperator`` has run."""

    dag_id: str
    is_paused: bool
    is_scheduled: bool
    last_state: str


class DatabaseFacts(NamedTuple):
    """What Airflow's database has of what keeps dstack runs from being left behind."""

    deferred: int
    reapers: tuple[ReaperFacts, ...]
    triggerer_hosts: tuple[str, ...]


def database_facts() -> DatabaseFacts:
    """Read Airflow's database as its own commands do; for the command line alone.

    Raises SQLAlchemy's errors when the database does not answer.
    """
    from airflow.jobs.job import Job
    from airflow.models import DagModel, TaskInstance
    from airflow.models.trigger import Trigger
    from airflow.utils.session import create_session
    from sqlalchemy import func, select

    with create_session() as session:
        deferred = session.scalar(
            select(func.count())
            .select_from(TaskInstance)
            .join(Trigger, TaskInstance.trigger_id == Trigger.id)
            .where(Trigger.classpath.startswith("airflow_provider_dstack."))
        )
        dags = session.execute(
            select(DagModel.dag_id, DagModel.is_paused, DagModel.timetable_summary)
            .where(DagModel.is_stale.is_(False))
            .where(
                DagModel.dag_id.in_(
                    select(TaskInstance.dag_id).where(TaskInstance.operator == "DstackReapOperator")
                )
            )
        ).all()
        reapers = []
        for dag_id, is_paused, schedule in dags:
            last = session.scalar(
                select(TaskInstance.state)
                .where(TaskInstance.dag_id == dag_id, TaskInstance.operator == "DstackReapOperator")
                .where(TaskInstance.end_date.is_not(None))
                .order_by(TaskInstance.end_date.desc())
                .limit(1)
            )
            # What a DAG that no time and no asset starts again has here.
            is_scheduled = schedule not in (None, "", "None", "@once")
            reapers.append(ReaperFacts(dag_id, bool(is_paused), is_scheduled, _word(last)))
        jobs = session.scalars(select(Job).where(Job.job_type == "TriggererJob", Job.state == "running"))
        hosts = tuple(sorted({str(job.hostname) for job in jobs if job.is_alive()}))
    return DatabaseFacts(int(deferred or 0), tuple(reapers), hosts)


def host_name() -> str:
    """Return this machine's name as Airflow's components write it into the database."""
    from airflow.utils.net import get_hostname

    return str(get_hostname())  # type: ignore[no-untyped-call]  # Airflow's is untyped


def server_conf() -> Any:
    """Return Airflow's configuration as its server components have it; for the command line alone."""
    from airflow.configuration import conf

    return conf


def server_connection(conn_id: str) -> Any:
    """Return a connection from Airflow's database or a secrets backend; for the command line alone.

    Raises ``AirflowNotFoundException``.
    """
    from airflow.models import Connection

    return Connection.get_connection_from_secrets(conn_id)


def api_address() -> str:
    """Return the address of Airflow's API server as it is configured, without a slash at its end."""
    return str(server_conf().get("api", "base_url", fallback="http://localhost:8080")).rstrip("/")


def _word(state: Any) -> str:
    return NO_STATUS if state is None else str(getattr(state, "value", state))


class TaskStateStoreLike(Protocol):
    """What is used of Airflow's task state store; it keeps JSON-plain values over tries."""

    def get(self, key: str) -> Any: ...
    def set(self, key: str, value: Any) -> None: ...
    def delete(self, key: str) -> None: ...


def task_state_store(context: Context) -> TaskStateStoreLike | None:
    """Return the store that survives a lost worker, None before Airflow 3.3."""
    return cast("TaskStateStoreLike | None", context.get("task_state_store"))


def push_xcom(ti: TaskInstanceLike, key: str, value: Any) -> None:
    """Write an XCom of a task instance; blocks for some milliseconds, also works in a triggerer's thread."""
    _xcom().set(key, value, **_xcom_address(ti))


def pull_xcom(ti: TaskInstanceLike, key: str) -> Any:
    """Return an XCom of a task instance, or None; blocks, also works in a triggerer's thread."""
    return _xcom().get_one(key=key, **_xcom_address(ti))


def delete_xcom(ti: TaskInstanceLike, key: str) -> None:
    """Remove an XCom of a task instance; blocks, works in a worker."""
    _xcom().delete(key, **_xcom_address(ti))


def _xcom() -> Any:
    from airflow.sdk.execution_time.xcom import XCom

    return XCom


def _xcom_address(ti: TaskInstanceLike) -> dict[str, Any]:
    index = -1 if ti.map_index is None else ti.map_index
    return {"dag_id": ti.dag_id, "task_id": ti.task_id, "run_id": ti.run_id, "map_index": index}


def mask_secret(secret: str) -> None:
    """Hide ``secret`` (str) from the task's log and the rendered fields from now on."""
    _first("mask_secret", "airflow.sdk.log", "airflow.sdk.execution_time.secrets_masker")(secret)


def stats() -> Any:
    """Return what counts for Airflow's metrics, with ``incr`` and ``gauge``; imported when it is needed."""
    try:
        module = import_module("airflow.sdk.observability.stats")
    except ImportError:
        module = import_module("airflow.stats")
    # Since 3.3 these are functions of the module.
    return module if hasattr(module, "incr") else module.Stats


def deferral_errors() -> tuple[type[Exception], ...]:
    """Return what Airflow raises on the worker when a deferral timed out or its trigger broke."""
    homes = ("airflow.sdk.exceptions", "airflow.exceptions")
    return (_first("TaskDeferralError", *homes), _first("TaskDeferralTimeout", *homes))


def has_retry_policies() -> bool:
    """Return whether this Airflow has retry policies, which came with 3.3."""
    return RetryDecision is not None


def trigger_has_on_kill() -> bool:
    """Return whether this Airflow calls a trigger's ``on_kill``; before 3.3 there is only ``cleanup``."""
    from airflow.triggers.base import BaseTrigger

    return hasattr(BaseTrigger, "on_kill")


def _first(name: str, *modules: str) -> Any:
    """Return ``name`` from the first of ``modules`` that has it; imported only when it is needed."""
    for module in modules[:-1]:
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return getattr(import_module(modules[-1]), name)
