"""Find the fleet of the ``dstack_fleet`` that a task is in.

A group is known by its attribute ``fleet_task_id``, so that submitting a run imports no task group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import AirflowFailException, BaseOperator, Context
from airflow_provider_dstack.links import FLEET_NAME_KEY

if TYPE_CHECKING:
    from dstack_core import Configuration


def on_fleet_of_group(task: BaseOperator, context: Context, configuration: Configuration) -> Configuration:
    """Return the configuration on the fleet of the innermost ``dstack_fleet`` that the task is in.

    One that names ``fleets`` is returned as it is, and so is that of a task in no such group.
    """
    group: Any = getattr(task, "task_group", None)
    while group is not None and not hasattr(group, "fleet_task_id"):
        group = group.parent_group
    if group is None or configuration.fleets:
        return configuration
    ti = context["ti"]
    # In a mapped group each index has its own fleet; elsewhere a mapped task shares that of its group.
    is_mapped = group.create.get_closest_mapped_task_group() is not None
    index = ti.map_index if is_mapped else -1
    name = ti.xcom_pull(task_ids=group.fleet_task_id, key=FLEET_NAME_KEY, map_indexes=index)
    if not name:
        # As after a setup that was marked success by hand.
        raise AirflowFailException(
            f"dstack_fleet: expected the fleet of task {group.fleet_task_id}, got none: that task created no "
            "fleet in this DAG run. Clear it, and with it this task."
        )
    return configuration.model_copy(update={"fleets": [str(name)]})
