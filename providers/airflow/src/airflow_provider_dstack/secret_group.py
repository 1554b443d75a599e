"""A task group whose tasks use project secrets that are set for the time of its DAG run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._setup_group import GROUP_OPTIONS, SetupGroup
from airflow_provider_dstack.secret_operators import DstackDeleteSecretsOperator, DstackSecretsOperator

if TYPE_CHECKING:
    from airflow.sdk import XComArg


class DstackSecretsGroup(SetupGroup):
    """A task group with a setup task that sets project secrets, and a teardown task that deletes them.

    Made by ``dstack_secrets``.

    Args:
        group_id: The group's id.
        secrets: The arguments of its ``DstackSecretsOperator``.
        **kwargs: As for Airflow's ``TaskGroup``.

    Attributes:
        create: The setup task.
        delete: The teardown task.
        env: The references by name, for ``env`` of a task in the group.

    Source: Airflow documentation, "Setup and Teardown".
    """

    create: DstackSecretsOperator
    delete: DstackDeleteSecretsOperator

    def __init__(self, group_id: str, secrets: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(group_id=group_id, **kwargs)
        shared = {
            name: secrets[name]
            for name in ("dstack_conn_id", "project_name", "retry_budget")
            if secrets.get(name) is not None
        }
        with self:
            self.create = DstackSecretsOperator(task_id="set_secrets", **secrets)
            self.delete = DstackDeleteSecretsOperator(
                task_id="delete_secrets", secrets_of=self.create, **shared
            )
        self.delete.as_teardown(setups=self.create)

    @property
    def env(self) -> XComArg:
        """The references by name."""
        return self.create.output


def dstack_secrets(secrets: Mapping[str, str], **kwargs: Any) -> DstackSecretsGroup:
    """Return a task group that sets secrets of Airflow as project secrets, and deletes them at its end.

    Its tasks pass ``env=group.env`` to their runs, or one reference of it: ``{"TOKEN": group.env["TOKEN"]}``.
    The secrets are deleted when the tasks have ended, also if one failed or the DAG run was marked failed.

    Args:
        secrets: Templates by the name that the run's variable has, as for ``DstackSecretsOperator``.
        **kwargs: ``group_id`` (default ``"secrets"``); ``dstack_conn_id``, ``project_name``, ``retry_budget``
            and others as for ``DstackSecretsOperator``, without ``keep``; and ``tooltip``, ``ui_color``,
            ``ui_fgcolor``, ``prefix_group_id``, ``parent_group`` and ``default_args`` as for Airflow's
            ``TaskGroup``.

    Returns:
        The group, for a ``with`` statement. Its ``create`` and ``delete`` are the tasks ``set_secrets`` and
        ``delete_secrets``.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.

    Example::

        with dstack_secrets({"HF_TOKEN": "{{ var.value.hf_token }}"}) as secrets:
            DstackRunOperator(task_id="train", configuration="train.dstack.yml", env=secrets.env)
    """
    if kwargs.get("keep"):
        raise ValueError(
            "dstack_secrets: expected secrets for the time of a DAG run, got keep=True. Use a "
            "DstackSecretsOperator for secrets that stay."
        )
    group = {name: kwargs.pop(name) for name in GROUP_OPTIONS if name in kwargs}
    return DstackSecretsGroup(kwargs.pop("group_id", "secrets"), {"secrets": secrets, **kwargs}, **group)
