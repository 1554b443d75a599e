"""The tags by which the bill of a cloud shows what a task's run has cost.

A tag's key is the same on every cloud, and its value is valid on the strictest (``tag_value``). The prefix
keeps them apart from the tags of the cloud's own accounts, and from dstack's (``owner``, ``dstack_name``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context


def automatic_tags(context: Context, owner: str | None) -> dict[str, str]:
    """Return the tags that name the task instance of a run; an empty value is left out."""
    from dstack_core.integration import tag_value

    ti = context["ti"]
    index = ti.map_index if ti.map_index is not None and ti.map_index >= 0 else None
    facts = {
        "airflow-dag": ti.dag_id,
        "airflow-task": ti.task_id,
        "airflow-run": ti.run_id,
        "airflow-try": ti.try_number,
        "airflow-map-index": index,
        "airflow-owner": owner,
    }
    # What a fact is, "dag" or "run", stands for a name of which no ASCII is left.
    values = {
        key: "" if fact is None else tag_value(fact, default=key.rpartition("-")[2])
        for key, fact in facts.items()
    }
    return {key: value for key, value in values.items() if value}


def read_default_tags(value: Any) -> Any:
    """Return ``default_tags`` of a connection's extra: a mapping, False for no tags, or what it is.

    A field of the connection's form holds JSON as a text.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        return value


def default_tags(of_connection: Any, automatic: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that a client's runs have by default: those of the connection win.

    Raises ``ConfigurationError``.
    """
    from dstack_core.integration import check_tags

    given = read_default_tags(of_connection)
    if given is False:
        return {}
    own = {} if given is None or given is True else check_tags("default_tags", given)
    return {**automatic, **own}
