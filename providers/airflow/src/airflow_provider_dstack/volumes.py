"""Create a network volume for the tasks of a DAG run, and delete it afterwards: for setup and teardown."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_dstack._compat import AirflowTaskTimeout, BaseOperator, Context
from airflow_provider_dstack._parameters import at_least, yes_or_no
from airflow_provider_dstack._resource_checks import check_volume
from airflow_provider_dstack._resource_names import ResourceOwner, setup_id
from airflow_provider_dstack._resource_waits import sleep_unless
from airflow_provider_dstack._templates import TemplatedModels
from airflow_provider_dstack.errors import DstackError
from airflow_provider_dstack.links import VOLUME_NAME_KEY, push

if TYPE_CHECKING:
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import Client, Volume, VolumeConfiguration

__all__ = ["DstackDeleteVolumeOperator", "DstackVolumeOperator"]

# A volume without data is deleted before a task that failed reports it.
_DELETE_SECONDS = 30.0


class DstackVolumeOperator(TemplatedModels):
    """An operator that creates a network volume and waits until runs can mount it; meant for ``as_setup``.

    The volume is created once, whatever replies are lost: a retry finds the volume of the try before by the
    owner's tags that it carries. A volume of that name with other tags, or in another place, is never
    touched, and the task fails. A task that fails, times out or is ended deletes its volume unless that is
    active: an active volume may hold data. No reaper deletes volumes.

    The task waits in the worker, because a volume is active within seconds; there is no ``deferrable``.

    Args:
        configuration: A ``dstack_core.VolumeConfiguration``, a dict as in YAML, YAML text, or the path of a
            ``.yml`` or ``.yaml`` file relative to the DAG's folder (a ``pathlib.Path`` for any other place).
            A ``name`` in it is ignored.
        name: The volume's name; mapped tasks append their map index to it. Default: one that no other DAG
            run has, made of the ids of the DAG and the task and a hash.
        keep: Keep the volume for all DAG runs of this DAG: each of them finds it by its ``name``, which is
            required. Default False: it belongs to one DAG run.
        wait_timeout: Seconds to wait until the volume is active. Default 600.
        retry_budget: Seconds to keep retrying an unreachable server. Default 600.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        The volume's name (str); also the XCom ``dstack_volume_name``, from its creation on.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed. ``configuration`` and ``name`` are
            checked then if no template and no other task's output is in them, and a file's text likewise.
        AirflowFailException: Input or access is wrong, the name belongs to another owner, or the server is
            older than 0.19.5, from which on volumes have tags.
        DstackServerUnreachable: The server did not answer within ``retry_budget``.
        DstackError: The volume could not be created, or not in time.

    Example:
        ``DstackVolumeOperator(task_id="create", configuration="data.volume.yml").as_setup()``

    Source: Airflow documentation, "Setup and Teardown".
    """

    template_fields: Sequence[str] = ("configuration", "name", "dstack_conn_id", "project_name")
    template_ext: Sequence[str] = (".yml", ".yaml")
    template_fields_renderers: ClassVar[dict[str, str]] = {"configuration": "yaml"}
    ui_color = "#d9f2e6"
    sets_up: ClassVar[str] = "the volume"

    def __init__(
        self,
        *,
        configuration: VolumeConfiguration | Mapping[str, Any] | str | os.PathLike[str],
        name: str | None = None,
        keep: bool = False,
        wait_timeout: float = 600.0,
        retry_budget: float = 600.0,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.configuration = configuration
        self.name = name
        self.keep = yes_or_no("keep", keep)
        if self.keep and not name:
            raise ValueError(
                "name: expected one for a volume with keep=True, by which each DAG run finds it."
            )
        self.wait_timeout = at_least("wait_timeout", wait_timeout, 1.0)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self._killed = False
        self._own: tuple[str, dict[str, str]] | None = None
        self._is_applying = False
        # Whether ``on_kill`` has deleted it, so that the end of the task does not do and log it again.
        self._is_deleted = False
        check_volume(self.configuration, self.name)

    def resolve_template_files(self) -> None:
        """Read the configuration's file when the DAG is parsed, and check what contains no template."""
        super().resolve_template_files()
        check_volume(self.configuration, self.name)

    def execute(self, context: Context) -> str:
        """Create the volume and wait until it is active; return its name."""
        from airflow_provider_dstack._outcome import raise_as_airflow_error
        from airflow_provider_dstack._parameters import read_volume
        from airflow_provider_dstack._task_volumes import delete_unused, tags_of
        from dstack_core import DstackError as CoreError

        owner = ResourceOwner.of(context, "volume")
        name, tags = owner.name(self.name), tags_of(owner, keep=self.keep)
        try:
            loaded = read_volume(self.configuration)
            wanted = loaded.model_copy(update={"tags": {**(loaded.tags or {}), **tags}})
            with self.hook().client(retry_budget=self.retry_budget) as client:
                self._own, self._is_applying = (name, tags), True
                volume = client.volumes.apply(wanted, name=name, sleep=self._sleep)
                self._is_applying = False
                self._sleep(0.0)
                push(context["ti"], VOLUME_NAME_KEY, name, self.log)
                self.log.info("Volume %s is %s in project %s.", name, volume.status, client.project)
                self._wait(client, name)
        except (Exception, AirflowTaskTimeout) as error:
            self._is_applying = False
            if not self._is_deleted:
                delete_unused(self.hook(), name, tags, timeout=_DELETE_SECONDS, log=self.log)
            if isinstance(error, CoreError):
                raise_as_airflow_error(error, submitted=False)
            raise
        return name

    def on_kill(self) -> None:
        """Delete the volume unless it is active; takes at most 4 seconds.

        Called in a signal handler, so another thread does the work. Source: Airflow documentation,
        "Operators".
        """
        from airflow_provider_dstack._stop import KILL_SECONDS
        from airflow_provider_dstack._task_volumes import delete_unused
        from airflow_provider_dstack._threads import start_thread

        self._killed = True
        if self._own is None:
            return
        name, tags = self._own
        done = threading.Event()

        def delete() -> None:
            hook, log = self.hook(), self.log
            is_deleted = delete_unused(
                hook, name, tags, timeout=KILL_SECONDS, log=log, may_appear=lambda: self._is_applying
            )
            # A request that was under way may still create it.
            self._is_deleted = is_deleted and not self._is_applying
            done.set()

        start_thread(delete, "dstack-delete-volume")
        done.wait(KILL_SECONDS)

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _wait(self, client: Client, name: str) -> None:
        from dstack_core import WaitTimeoutError

        try:
            client.volumes.wait(name, timeout=self.wait_timeout, sleep=self._sleep)
        except WaitTimeoutError:
            raise DstackError(
                f"Volume {name}: expected it to be active within {self.wait_timeout:g} s, got none. "
                "Check it in the cloud, or raise wait_timeout."
            ) from None
        self.log.info("Runs can mount volume %s.", name)

    def _sleep(self, seconds: float) -> None:
        sleep_unless(lambda: self._killed, seconds, "its volume was active")


class DstackDeleteVolumeOperator(BaseOperator):
    """An operator that deletes volumes with their data; meant for ``as_teardown``.

    A volume that is gone is not an error. Runs that still use a volume are waited for. Only volumes that
    tasks of this DAG created are deleted. Exactly one of ``volume_of`` and ``name`` is given. Without this
    operator a volume is kept.

    Args:
        volume_of: The ``DstackVolumeOperator`` of the same DAG whose volume is deleted, or its task id; in a
            mapped task group, the one of the same map index. Default: none.
        name: The volume's name (str or list; an empty name is skipped). Default: none.
        wait_timeout: Seconds to wait until the volumes are gone. Default 600.
        retry_budget: Seconds to keep retrying an unreachable server. Default 600.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        A dict: ``"deleted"`` or ``"gone"`` for each volume, by name.

    Raises:
        AirflowFailException: The connection is wrong, or a volume belongs to another owner.
        DstackServerUnreachable: The server did not answer within ``retry_budget``.
        DstackError: A volume is still there after ``wait_timeout``.

    Example:
        ``DstackDeleteVolumeOperator(task_id="delete", volume_of=create).as_teardown(setups=create)``

    Source: Airflow documentation, "Setup and Teardown".
    """

    template_fields: Sequence[str] = ("volume_of", "name", "dstack_conn_id", "project_name")
    ui_color = "#ffe4e1"

    def __init__(
        self,
        *,
        volume_of: BaseOperator | str | None = None,
        name: str | Sequence[str] | None = None,
        wait_timeout: float = 600.0,
        retry_budget: float = 600.0,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (volume_of is None) == (name is None):
            got = "neither" if name is None else "both"
            raise ValueError(
                f"DstackDeleteVolumeOperator: expected volume_of (a task) or name (of a volume), got {got}."
            )
        self.volume_of = getattr(volume_of, "task_id", volume_of)
        self.name = name
        self.wait_timeout = at_least("wait_timeout", wait_timeout, 1.0)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self._killed = False

    def execute(self, context: Context) -> dict[str, str]:
        """Delete the volumes and return what became of each."""
        from airflow_provider_dstack._outcome import raise_as_airflow_error
        from airflow_provider_dstack._task_volumes import delete_volume
        from dstack_core import DstackError as CoreError

        done: dict[str, str] = {}
        try:
            with self.hook().client(retry_budget=self.retry_budget) as client:
                for name in self._names(client, context):
                    done[name] = delete_volume(
                        client, name, timeout=self.wait_timeout, sleep=self._sleep, log=self.log
                    )
        except CoreError as error:
            raise_as_airflow_error(error, submitted=True)
        return done

    def on_kill(self) -> None:
        """End the wait; what the server has accepted is still deleted."""
        self._killed = True

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _names(self, client: Client, context: Context) -> list[str]:
        """Return the volumes to delete. Raises ``AirflowFailException``; then nothing was deleted."""
        from airflow_provider_dstack._compat import AirflowFailException
        from airflow_provider_dstack._task_volumes import is_of_dag

        if self.volume_of is not None:
            return self._of_task(client, context)
        found = []
        for name in [self.name] if isinstance(self.name, str) else self.name or ():
            # What a template makes of an XCom that is not there.
            if name in (None, "", "None"):
                continue
            volume = client.volumes.get(name)
            if volume is not None and not is_of_dag(volume, context["ti"].dag_id):
                raise AirflowFailException(
                    f"name: expected a volume that this DAG created, got {name!r}, which it did not create. "
                    "It was left alone. Correct the name, or delete that volume by hand."
                )
            found.append(name)
        return found

    def _of_task(self, client: Client, context: Context) -> list[str]:
        owner = ResourceOwner.of(context, "volume", setup_id(context, "volume_of", self.volume_of))
        # Clearing a DAG run gives it another start, from which tags are made; its XComs stay.
        pulled = context["ti"].xcom_pull(task_ids=owner.task_id, key=VOLUME_NAME_KEY)
        pushed = [pulled] if isinstance(pulled, str) else list(pulled or ())
        found = [volume.name for volume in client.volumes.list() if _is_of(volume, owner, pushed)]
        if not found:
            self.log.info("There is no volume of task %s in project %s.", self.volume_of, client.project)
        return found

    def _sleep(self, seconds: float) -> None:
        sleep_unless(lambda: self._killed, seconds, "the volume was gone")


def _is_of(volume: Volume, owner: ResourceOwner, pushed: Collection[str]) -> bool:
    """Return whether a volume is of the wanted task: by its tags, or by its name in the task's XComs."""
    from airflow_provider_dstack._task_volumes import is_of_dag, is_of_task

    if is_of_task(volume, owner):
        return True
    # XComs of a mapped task are those of all its indices.
    return owner.map_index is None and volume.name in pushed and is_of_dag(volume, owner.dag_id)
