"""Name runs so that the same try of a task always means the same run (PROTOCOL 1.4)."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskInstanceLike


def run_name(ti: TaskInstanceLike) -> str:
    """Return the run name of this try: ``af-`` and 12 hex digits."""
    return f"af-{sha256(marker(ti).encode()).hexdigest()[:12]}"


def marker(ti: TaskInstanceLike) -> str:
    """Return what is written on the run to know it again.

    ``airflow:dag/run/task[map_index]/try#id``; the id of the task instance, which Airflow draws anew for
    every try, keeps apart two Airflows that share a project, and a DAG run that was deleted and made again.
    """
    index = f"[{ti.map_index}]" if ti.map_index is not None and ti.map_index >= 0 else ""
    return (
        f"airflow:{ti.dag_id}/{ti.run_id}/{ti.task_id}{index}/{ti.try_number}#{getattr(ti, 'id', None) or ''}"
    )
