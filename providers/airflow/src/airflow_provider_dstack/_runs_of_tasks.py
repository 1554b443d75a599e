"""Find the runs of other tasks: by the names that a DAG gives, and by the markers that tasks give them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack.errors import DstackError

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._names import TaskNames
    from dstack_core import Run


def names_in(given: Any) -> list[str]:
    """Return run names from what a template or an XCom made of ``run_name``."""
    if isinstance(given, Mapping):
        given = given.get("run_name")
    if given is None or isinstance(given, str):
        # What a template makes of an XCom that is not there.
        return [] if given in (None, "", "None") else [given]
    if not isinstance(given, Iterable):
        raise DstackError(f"run_name: expected the name of a run, or a list of names, got {given!r}.")
    return list(dict.fromkeys(name for one in given for name in names_in(one)))


def names_of_task(task_id: str, context: Context) -> TaskNames:
    from dataclasses import replace

    from airflow_provider_dstack._names import TaskNames

    own, ti = TaskNames.of(context), context["ti"]
    return replace(own, task=f"airflow:{ti.dag_id}/{ti.run_id}/{task_id}")


def is_of(run: Run, names: TaskNames, pushed: Collection[str], context: Context) -> bool:
    """Return whether a run is of that task, or of one of its mapped instances.

    ``pushed`` are the names of runs that the task pushed as XComs.
    """
    from dataclasses import replace

    marker = run.marker or ""
    head, bracket, _ = marker.removeprefix(f"{names.task}[").partition("]")
    if marker.startswith(f"{names.task}[") and bracket and head.isdecimal():
        own = context["ti"].map_index
        if own is not None and own >= 0 and int(head) != own:
            return False
        names = replace(names, task=f"{names.task}[{head}]")
    ours = names.read_marker(marker) is not None
    return ours or (run.name in pushed and marker.startswith(f"{names.task}/"))
