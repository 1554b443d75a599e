"""The operators that set and delete project secrets; DAGs import them from ``project_secrets``."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_dstack._compat import (
    AirflowFailException,
    AirflowTaskTimeout,
    BaseOperator,
    Context,
    mask_secret,
)
from airflow_provider_dstack._parameters import at_least, yes_or_no
from airflow_provider_dstack._resource_names import setup_id
from airflow_provider_dstack.errors import DstackRunInterrupted

if TYPE_CHECKING:
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import Client

__all__ = ["DstackDeleteSecretsOperator", "DstackSecretsOperator"]

# As for a fleet: the secrets of a task that failed are deleted before the task reports it.
_DELETE_SECONDS = 30.0
_REFERENCE = re.compile(r"\$\{\{ secrets\.(\w+) \}\}")


class DstackSecretsOperator(BaseOperator):
    """An operator that sets Airflow's secrets as project secrets of dstack; meant for ``as_setup``.

    Runs get references such as ``${{ secrets.NAME }}``, so that no value stands in their environment, which
    the server shows to every member of the project. The name of a secret holds the DAG run, so that DAG runs
    never share one, and a retry sets the same names again. A task that fails or is ended deletes what it has
    set, because Airflow runs no teardown of a setup that failed. Tasks downstream mask the values in the logs
    of their runs.

    Args:
        secrets: Templates by the name that the run's variable has: ``"{{ var.value.hf_token }}"``,
            ``"{{ conn.hub.password }}"``. They read ``var`` and ``conn`` alone, are rendered when the task
            runs, and are not among the rendered fields that Airflow shows.
        keep: Set them for good, under the names given, for all runs of the project. Default False.
        overwrite: With ``keep``, replace secrets that the project has under these names. Default False: they
            are refused, because the server does not show whose they are.
        retry_budget: Seconds to keep retrying an unreachable server. Default 600.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        A dict of references by name, for ``env`` of a run: ``{"HF_TOKEN": "${{ secrets.NAME }}"}``.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.
        AirflowFailException: A template, what it reads or the connection is wrong, a name is taken, or the
            server is older than 0.19.17 and has no project secrets.
        DstackServerUnreachable: The server did not answer within ``retry_budget``.
        DstackError: Airflow did not answer.

    Example:
        ``DstackSecretsOperator(task_id="set", secrets={"HF_TOKEN": "{{ var.value.hf_token }}"}).as_setup()``

    Source: Airflow documentation, "Setup and Teardown".
    """

    # Not the secrets: Airflow shows rendered fields.
    template_fields: Sequence[str] = ("dstack_conn_id", "project_name")
    ui_color = "#d9f2e6"
    # By which tasks downstream find its templates, without an import of this class.
    sets_project_secrets: ClassVar[bool] = True
    sets_up: ClassVar[str] = "the project secrets"

    def __init__(
        self,
        *,
        secrets: Mapping[str, str],
        keep: bool = False,
        overwrite: bool = False,
        retry_budget: float = 600.0,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        from airflow_provider_dstack._airflow_secrets import check_sources

        # ``output["HF_TOKEN"]`` reads an XCom of that key.
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.secret_sources = check_sources(secrets)
        self.keep = yes_or_no("keep", keep)
        self.overwrite = yes_or_no("overwrite", overwrite)
        if overwrite and not keep:
            raise ValueError(
                "overwrite: expected keep=True with it, got keep=False. Secrets of a DAG run have new names."
            )
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self._killed = False
        # What this task deletes if it fails.
        self._own: list[str] = []
        self._is_setting = False

    def execute(self, context: Context) -> dict[str, str]:
        """Read the values, set the secrets and return the references."""
        from airflow_provider_dstack._airflow_secrets import read_sources
        from airflow_provider_dstack._outcome import raise_as_airflow_error
        from airflow_provider_dstack._secret_owners import secret_names_of
        from dstack_core import DstackError as CoreError

        variables = self.secret_sources
        names = {one: one for one in variables} if self.keep else secret_names_of(context, variables)
        values = read_sources(variables)
        for value in values.values():
            mask_secret(value)
        try:
            with self.hook().client(retry_budget=self.retry_budget) as client:
                if self.keep and not self.overwrite:
                    _refuse_taken(client, names.values())
                self._own, self._is_setting = [], True
                for variable, name in names.items():
                    self._raise_if_killed()
                    if not self.overwrite:
                        self._own.append(name)
                    client.secrets.set(name, values[variable])
                self._is_setting = False
                self._raise_if_killed()
                self.log.info(
                    "Project secrets are set in project %s: %s.", client.project, ", ".join(names.values())
                )
        except (Exception, AirflowTaskTimeout) as error:
            self._is_setting = False
            self._delete_own(_DELETE_SECONDS)
            if isinstance(error, CoreError):
                raise_as_airflow_error(error, submitted=False)
            raise
        return {variable: f"${{{{ secrets.{name} }}}}" for variable, name in names.items()}

    def on_kill(self) -> None:
        """Delete what was set; takes at most 4 seconds.

        Called in a signal handler, so another thread does the work. Source: Airflow documentation,
        "Operators".
        """
        from airflow_provider_dstack._stop import KILL_SECONDS
        from airflow_provider_dstack._threads import start_thread

        self._killed = True
        if not self._own:
            return
        done = threading.Event()

        def delete() -> None:
            self._delete_own(KILL_SECONDS)
            done.set()

        start_thread(delete, "dstack-delete-secrets")
        done.wait(KILL_SECONDS)

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _raise_if_killed(self) -> None:
        if self._killed:
            raise DstackRunInterrupted("The task was ended before its project secrets were set.")

    def _delete_own(self, seconds: float) -> None:
        from airflow_provider_dstack._secret_deletion import delete_own

        hook, own, log = self.hook(), self._own, self.log
        delete_own(hook, own, timeout=seconds, log=log, may_appear=lambda: self._is_setting)


class DstackDeleteSecretsOperator(BaseOperator):
    """An operator that deletes the project secrets of a DAG run; meant for ``as_teardown``.

    Secrets that are gone are not an error. Put it after the runs that use them: one that has not started yet
    does not find a deleted secret. What was set with ``keep=True`` is left.

    Args:
        secrets_of: The ``DstackSecretsOperator`` of the same DAG, or its task id; in a mapped task group,
            the one of the same map index.
        retry_budget: Seconds to keep retrying an unreachable server. Default 600.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        The list of the names of the deleted secrets.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.
        AirflowFailException: The connection is wrong, or the server is older than 0.19.17.
        DstackServerUnreachable: The server did not answer within ``retry_budget``.

    Example:
        ``DstackDeleteSecretsOperator(task_id="delete", secrets_of=create).as_teardown(setups=create)``

    Source: Airflow documentation, "Setup and Teardown".
    """

    template_fields: Sequence[str] = ("secrets_of", "dstack_conn_id", "project_name")
    ui_color = "#ffe4e1"

    def __init__(
        self,
        *,
        secrets_of: BaseOperator | str,
        retry_budget: float = 600.0,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.secrets_of = getattr(secrets_of, "task_id", secrets_of)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name

    def execute(self, context: Context) -> list[str]:
        """Delete the secrets and return their names."""
        from airflow_provider_dstack._outcome import raise_as_airflow_error
        from airflow_provider_dstack._secret_owners import owner_of_secret, owner_prefix
        from dstack_core import DstackError as CoreError

        ti, task_id = context["ti"], setup_id(context, "secrets_of", self.secrets_of)
        prefix = owner_prefix(context, task_id)
        # Clearing a DAG run gives it another start, from which names are made; its XComs stay.
        if ti.map_index is None or ti.map_index < 0:
            pushed = _names_in(ti.xcom_pull(task_ids=task_id))
        else:
            pushed = _names_in(ti.xcom_pull(task_ids=task_id, map_indexes=ti.map_index))
        deleted = []
        try:
            with self.hook().client(retry_budget=self.retry_budget) as client:
                for name in sorted(secret.name for secret in client.secrets.list()):
                    owner = owner_of_secret(name) if name in pushed else None
                    is_pushed = owner is not None and (owner.dag_id, owner.run_id) == (ti.dag_id, ti.run_id)
                    if (name.startswith(prefix) or is_pushed) and client.secrets.delete(name):
                        deleted.append(name)
                shown = ", ".join(deleted) or "none was left"
                self.log.info("Project secrets deleted in project %s: %s.", client.project, shown)
        except CoreError as error:
            raise_as_airflow_error(error, submitted=True)
        return deleted

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)


def _names_in(pulled: Any) -> set[str]:
    """Return the names in what a setup returned, or in what all instances of a mapped one did."""
    found = [pulled] if isinstance(pulled, Mapping) else list(pulled or ())
    values = [str(value) for one in found if isinstance(one, Mapping) for value in one.values()]
    return {match[1] for value in values if (match := _REFERENCE.fullmatch(value))}


def _refuse_taken(client: Client, names: Any) -> None:
    taken = sorted({secret.name for secret in client.secrets.list()}.intersection(names))
    if taken:
        raise AirflowFailException(
            f"secrets: expected names that are free in project {client.project}, got {', '.join(taken)}. Set "
            "overwrite=True to replace their values, or choose other names."
        )
