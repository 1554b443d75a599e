"""Refuse fields that name the result of a setup task which has none: project secrets, a fleet, a volume.

A user may mark a setup task as success although it did not run. Airflow then fills in None, or the text
``None``, and a run would be submitted without its secrets, or for a fleet that does not exist.

Such tasks are known by their attribute ``sets_up``, so that submitting a run imports none of their classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._parameters import is_model

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context

# The text of ``task.output``, and what DAGs write by hand. One with a filter or a default of its own is left.
_PULL = re.compile(
    r"\{\{\s*(?:ti|task_instance)\.xcom_pull\(\s*(?:task_ids=)?(['\"])(?P<task>[^'\"]+)\1"
    r"(?:,\s*dag_id=['\"][^'\"]+['\"])?(?:,\s*key=(['\"])(?P<key>[^'\"]+)\3)?\s*\)\s*\}\}"
)


def refuse_missing_results(task: Any, field: str, value: Any, context: Context) -> None:
    """Raise ``AirflowFailException`` if a field names the result of a setup task that has none."""
    for setup, result in _results_in(task, value, context):
        if result is None:
            raise AirflowFailException(
                f"{field}: expected {setup.sets_up} of task {setup.task_id}, got none: that task was marked "
                "success, or set up nothing in this DAG run. Clear it, and with it its downstream tasks."
            )


def _results_in(task: Any, value: Any, context: Context) -> Iterator[tuple[Any, Any]]:
    """Yield the setup tasks that a value names, each with its result."""
    if isinstance(value, str):
        for found in _PULL.finditer(value) if "xcom_pull" in value and task.has_dag() else ():
            setup: Any = task.dag.task_dict.get(found["task"])
            if hasattr(setup, "sets_up"):
                key = found["key"] or "return_value"
                yield setup, context["ti"].xcom_pull(task_ids=setup.task_id, key=key)
    elif hasattr(type(value), "iter_references"):
        from airflow.sdk import XComArg

        for setup, key in value.iter_references():
            if hasattr(setup, "sets_up"):
                yield setup, XComArg(setup, key).resolve(context)
    else:
        inside: Any = value if isinstance(value, list | tuple) else ()
        if is_model(value):
            inside = [getattr(value, name) for name in value.model_fields_set]
        elif isinstance(value, Mapping):
            inside = value.values()
        for one in inside:
            yield from _results_in(task, one, context)
