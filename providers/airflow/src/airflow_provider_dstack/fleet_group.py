"""A task group whose tasks run on the machines of a fleet of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._setup_group import GROUP_OPTIONS, SetupGroup
from airflow_provider_dstack.fleet_operators import DstackDeleteFleetOperator, DstackFleetOperator

if TYPE_CHECKING:
    from dstack_core import FleetConfiguration

_FILES = (".yml", ".yaml")


class DstackFleetGroup(SetupGroup):
    """A task group with a setup task that creates a fleet, and a teardown task that deletes it.

    Made by ``dstack_fleet``.

    Args:
        group_id: The group's id.
        fleet: The arguments of its ``DstackFleetOperator``.
        **kwargs: As for Airflow's ``TaskGroup``.

    Attributes:
        create: The setup task.
        delete: The teardown task.
        name: A template of the fleet's name, for any templated field of a task downstream of ``create``.

    Source: Airflow documentation, "Setup and Teardown".
    """

    create: DstackFleetOperator
    delete: DstackDeleteFleetOperator

    def __init__(self, group_id: str, fleet: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(group_id=group_id, **kwargs)
        shared = {
            name: fleet[name]
            for name in ("dstack_conn_id", "project_name", "retry_budget")
            if fleet.get(name) is not None
        }
        with self:
            self.create = DstackFleetOperator(task_id="create_fleet", **fleet)
            self.delete = DstackDeleteFleetOperator(task_id="delete_fleet", fleet_of=self.create, **shared)
        self.delete.as_teardown(setups=self.create)

    @property
    def fleet_task_id(self) -> str:
        """The id of the task that creates the fleet."""
        return str(self.create.task_id)

    @property
    def name(self) -> str:
        """The template of the fleet's name."""
        return f"{{{{ ti.xcom_pull(task_ids={self.create.task_id!r}) }}}}"


def dstack_fleet(
    fleet: FleetConfiguration | Mapping[str, Any] | str | os.PathLike[str],
    configuration: FleetConfiguration | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> DstackFleetGroup:
    """Return a task group that creates a fleet, runs its tasks on it, and deletes it.

    Tasks of the group that submit runs (``DstackRunOperator``, ``@task.dstack`` and the others, also mapped
    ones and those of groups in it) use the fleet, unless their configuration or profile names ``fleets``.
    The fleet is deleted when the tasks have ended, also if one failed or the DAG run was marked failed.

    Args:
        fleet: The group's id (a str), with the fleet's configuration as the next argument; or the
            configuration itself, as for ``DstackFleetOperator``, whose group is called ``fleet``.
        configuration: The fleet's configuration if ``fleet`` is the group's id.
        **kwargs: As for ``DstackFleetOperator``, such as ``name`` and ``deferrable``; and ``group_id``,
            ``tooltip``, ``ui_color``, ``ui_fgcolor``, ``prefix_group_id``, ``parent_group`` and
            ``default_args`` as for Airflow's ``TaskGroup``.

    Returns:
        The group, for a ``with`` statement. Its ``create`` and ``delete`` are the tasks ``create_fleet`` and
        ``delete_fleet``, and its ``name`` is a template of the fleet's name.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.

    Example::

        with dstack_fleet("gpus", {"nodes": "0..2", "resources": "24GB.."}) as fleet:
            ...
    """
    if configuration is not None:
        if not isinstance(fleet, str) or fleet.endswith(_FILES) or "\n" in fleet:
            shown = repr(fleet) if isinstance(fleet, str) else f"a {type(fleet).__name__}"
            raise ValueError(
                f"dstack_fleet: expected the group's id (a str) before the configuration, got {shown}. Pass "
                'one configuration, or an id and a configuration: dstack_fleet("gpus", {"nodes": "0..2"}).'
            )
        if "group_id" in kwargs:
            raise ValueError(
                f"dstack_fleet: expected one id of the group, got {fleet!r} and "
                f"group_id={kwargs['group_id']!r}. Leave one of them out."
            )
        group_id = fleet
    elif isinstance(fleet, str) and not fleet.endswith(_FILES) and "\n" not in fleet:
        raise ValueError(
            f"dstack_fleet: expected a configuration, got only the id {fleet!r}. Pass the fleet's "
            'configuration after it, such as dstack_fleet("gpus", {"nodes": "0..2"}).'
        )
    else:
        group_id, configuration = kwargs.pop("group_id", "fleet"), fleet
    group = {name: kwargs.pop(name) for name in GROUP_OPTIONS if name in kwargs}
    return DstackFleetGroup(str(group_id), {"configuration": configuration, **kwargs}, **group)
