"""The operators that create and delete fleets; DAGs import them from ``fleets``."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from airflow_provider_dstack._compat import (
    AirflowTaskTimeout,
    BaseOperator,
    Context,
    conf,
    deferral_errors,
)
from airflow_provider_dstack._parameters import at_least, most, yes_or_no
from airflow_provider_dstack._resource_checks import check_fleet
from airflow_provider_dstack._resource_names import ResourceOwner, setup_id
from airflow_provider_dstack._resource_waits import sleep_unless
from airflow_provider_dstack._templates import TemplatedModels
from airflow_provider_dstack.errors import DstackError
from airflow_provider_dstack.links import FLEET_NAME_KEY, push

if TYPE_CHECKING:
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import Client, Fleet, FleetConfiguration

__all__ = ["DstackDeleteFleetOperator", "DstackFleetOperator"]

# A fleet of a task that failed is deleted before the task reports it; the reaper does what takes longer.
_DELETE_SECONDS = 30.0


class DstackFleetOperator(TemplatedModels):
    """An operator that creates a fleet and waits until its machines are ready; meant for ``as_setup``.

    The fleet is created once, whatever replies are lost: a retry finds the fleet of the try before by the
    owner's mark that it carries, and changes it in place if the configuration differs. A fleet of that name
    with another mark, or without one, is never touched. A task that fails, times out or is ended deletes its
    fleet, because Airflow runs no teardown of a setup that failed; a retry creates it again.

    Args:
        configuration: A ``dstack_core.FleetConfiguration``, a dict as in YAML, YAML text, or the path of a
            ``.yml`` or ``.yaml`` file relative to the DAG's folder (a ``pathlib.Path`` for any other place).
            A ``name`` in it is ignored.
        name: The fleet's name; mapped tasks append their map index to it. Default: one that no other DAG run
            has, made of the ids of the DAG and the task and a hash.
        machines: How many machines to wait for, idle or busy; at most those that ``nodes`` allows. Default:
            those that the fleet creates by itself, which are the minimum of ``nodes``, or its SSH hosts; with
            ``nodes: 0..2`` none.
        wait_timeout: Seconds to wait for the machines. Default 1800.
        deferrable: Have the triggerer wait for the machines, and give the worker's slot back. Default:
            Airflow's setting ``[operators] default_deferrable``.
        poll_interval: Seconds between two polls while the task waits, 0.1 or more. Default 5.
        retry_budget: Seconds to keep retrying an unreachable server, and to wait for a fleet of that name
            that is being deleted. Default 600.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        The fleet's name (str); also the XCom ``dstack_fleet_name``, from its creation on.

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed. ``configuration`` and ``name`` are
            checked then if no template and no other task's output is in them, and a file's text likewise.
        AirflowFailException: Input or access is wrong, or the name belongs to another owner.
        DstackServerUnreachable: The server did not answer within ``retry_budget``.
        DstackError: The machines did not come in time, or something else deleted the fleet.

    Example:
        ``DstackFleetOperator(task_id="create", configuration={"nodes": "0..2"}).as_setup()``

    Source: Airflow documentation, "Setup and Teardown".
    """

    template_fields: Sequence[str] = ("configuration", "name", "dstack_conn_id", "project_name")
    template_ext: Sequence[str] = (".yml", ".yaml")
    template_fields_renderers: ClassVar[dict[str, str]] = {"configuration": "yaml"}
    ui_color = "#d9f2e6"
    sets_up: ClassVar[str] = "the fleet"

    def __init__(
        self,
        *,
        configuration: FleetConfiguration | Mapping[str, Any] | str | os.PathLike[str],
        name: str | None = None,
        machines: int | None = None,
        wait_timeout: float = 1800.0,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.configuration = configuration
        self.name = name
        self.machines = most("machines", machines, 0)
        self.wait_timeout = at_least("wait_timeout", wait_timeout, 1.0)
        self.deferrable = yes_or_no("deferrable", deferrable)
        self.poll_interval = at_least("poll_interval", poll_interval, 0.1)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self._killed = False
        self._own: tuple[str, str] | None = None
        self._is_applying = False
        check_fleet(self.configuration, self.name, self.machines)

    def resolve_template_files(self) -> None:
        """Read the configuration's file when the DAG is parsed, and check what contains no template."""
        super().resolve_template_files()
        check_fleet(self.configuration, self.name, self.machines)

    def execute(self, context: Context) -> str:
        """Create the fleet; wait for its machines, or hand the wait to the triggerer."""
        from airflow_provider_dstack._outcome import raise_as_airflow_error
        from airflow_provider_dstack._parameters import read_fleet
        from dstack_core import DstackError as CoreError
        from dstack_core.integration import check_machines

        owner = ResourceOwner.of(context, "fleet")
        name = owner.name(self.name)
        try:
            configuration = read_fleet(self.configuration)
            if self.machines is not None:
                check_machines("machines", self.machines, configuration)
            with self.hook().client(retry_budget=self.retry_budget) as client:
                self._own, self._is_applying = (name, owner.mark), True
                fleet = client.fleets.apply(configuration, name=name, marker=owner.mark, sleep=self._sleep)
                self._is_applying = False
                self._sleep(0.0)
                push(context["ti"], FLEET_NAME_KEY, name, self.log)
                self.log.info("Fleet %s is %s in project %s.", name, fleet.status, client.project)
                self._wait(client, fleet, owner.mark, configuration)
        except (Exception, AirflowTaskTimeout) as error:
            self._is_applying = False
            self._delete_own(context)
            if isinstance(error, CoreError):
                raise_as_airflow_error(error, submitted=False)
            raise
        return name

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> str:
        """Return the fleet's name once the trigger saw its machines, or raise the error that it reported."""
        from airflow_provider_dstack._fleet_wait import READY, too_late
        from airflow_provider_dstack.fleet_trigger import TIMED_OUT

        name = ResourceOwner.of(context, "fleet").name(self.name)
        if event["kind"] == READY:
            self.log.info("%s", event["text"])
            return name
        self._delete_own(context)
        if event["kind"] == TIMED_OUT:
            raise DstackError(too_late(name, self.wait_timeout, event["text"]))
        if "text" in event:
            raise DstackError(f"{event['text']} Find out what deleted it, and run the task again.")
        from airflow_provider_dstack._outcome import broken_error

        raise broken_error(event)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Resume after the deferral; where that timed out or failed, delete the fleet first."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except deferral_errors():
            self._delete_own(context)
            raise

    def on_kill(self) -> None:
        """Delete the fleet; takes at most 4 seconds.

        Called in a signal handler, so another thread does the work. Source: Airflow documentation,
        "Operators".
        """
        from airflow_provider_dstack._fleet_deletion import delete_own
        from airflow_provider_dstack._stop import KILL_SECONDS
        from airflow_provider_dstack._threads import start_thread

        self._killed = True
        if self._own is None:
            return
        name, mark = self._own
        done = threading.Event()

        def delete() -> None:
            hook, log = self.hook(), self.log
            delete_own(hook, name, mark, timeout=KILL_SECONDS, log=log, may_appear=lambda: self._is_applying)
            done.set()

        start_thread(delete, "dstack-delete-fleet")
        done.wait(KILL_SECONDS)

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _wait(self, client: Client, fleet: Fleet, mark: str, configuration: FleetConfiguration) -> None:
        """Wait for the machines. Raises ``DstackError``; defers a deferrable task that has to wait."""
        from airflow_provider_dstack._fleet_wait import (
            LOST,
            READY,
            sight_of_fleet,
            too_late,
        )
        from dstack_core import clock

        wanted = configuration.machines_at_start if self.machines is None else self.machines
        if wanted == 0:
            return
        end = clock.monotonic() + self.wait_timeout
        found: Fleet | None = fleet
        shown = ""
        while True:
            sight = sight_of_fleet(fleet.name, mark, found, wanted)
            if sight.text != shown:
                shown = sight.text
                self.log.info("%s", shown)
            if sight.state == READY:
                return
            if sight.state == LOST:
                raise DstackError(f"{shown} Find out what deleted it, and run the task again.")
            if self.deferrable:
                self._defer(fleet.name, mark, wanted)
            if clock.monotonic() >= end:
                raise DstackError(too_late(fleet.name, self.wait_timeout, shown))
            self._sleep(self.poll_interval)
            found = client.fleets.get(fleet.name)

    def _defer(self, name: str, mark: str, machines: int) -> NoReturn:
        from airflow_provider_dstack._from_operator import BACKSTOP_SECONDS, SETTLE_SECONDS
        from airflow_provider_dstack.fleet_trigger import DstackFleetTrigger
        from dstack_core import clock

        trigger = DstackFleetTrigger(
            dstack_conn_id=self.dstack_conn_id,
            project_name=self.project_name,
            name=name,
            mark=mark,
            machines=machines,
            poll_interval=self.poll_interval,
            deadline=clock.epoch() + self.wait_timeout,
            not_before=clock.epoch() + SETTLE_SECONDS,
        )
        limit = timedelta(seconds=self.wait_timeout + BACKSTOP_SECONDS)
        self.defer(trigger=trigger, method_name="execute_complete", timeout=limit)
        raise RuntimeError("the task was not deferred")

    def _delete_own(self, context: Context) -> None:
        from airflow_provider_dstack._fleet_deletion import delete_own

        owner = ResourceOwner.of(context, "fleet")
        name, log = owner.name(self.name), self.log
        delete_own(self.hook(), name, owner.mark, timeout=_DELETE_SECONDS, log=log)

    def _sleep(self, seconds: float) -> None:
        sleep_unless(lambda: self._killed, seconds, "its fleet had its machines")


class DstackDeleteFleetOperator(BaseOperator):
    """An operator that deletes fleets and waits until their machines are gone; meant for ``as_teardown``.

    A fleet that is gone is not an error. Runs that still use a fleet are waited for. Only fleets that tasks
    of this DAG created are deleted. Exactly one of ``fleet_of`` and ``name`` is given.

    Args:
        fleet_of: The ``DstackFleetOperator`` of the same DAG whose fleet is deleted, or its task id; in a
            mapped task group, the one of the same map index. Default: none.
        name: The fleet's name (str or list; an empty name is skipped). Default: none.
        wait_timeout: Seconds to wait until the fleets are gone. Default 1800.
        retry_budget: Seconds to keep retrying an unreachable server. Default 600.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        A dict: ``"deleted"`` or ``"gone"`` for each fleet, by name.

    Raises:
        AirflowFailException: The connection is wrong, or a fleet belongs to another owner.
        DstackServerUnreachable: The server did not answer within ``retry_budget``.
        DstackError: A fleet is still there after ``wait_timeout``.

    Example:
        ``DstackDeleteFleetOperator(task_id="delete", fleet_of=create).as_teardown(setups=create)``

    Source: Airflow documentation, "Setup and Teardown".
    """

    template_fields: Sequence[str] = ("fleet_of", "name", "dstack_conn_id", "project_name")
    ui_color = "#ffe4e1"

    def __init__(
        self,
        *,
        fleet_of: BaseOperator | str | None = None,
        name: str | Sequence[str] | None = None,
        wait_timeout: float = 1800.0,
        retry_budget: float = 600.0,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (fleet_of is None) == (name is None):
            got = "neither" if name is None else "both"
            raise ValueError(
                f"DstackDeleteFleetOperator: expected fleet_of (a task) or name (of a fleet), got {got}."
            )
        self.fleet_of = getattr(fleet_of, "task_id", fleet_of)
        self.name = name
        self.wait_timeout = at_least("wait_timeout", wait_timeout, 1.0)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self._killed = False

    def execute(self, context: Context) -> dict[str, str]:
        """Delete the fleets and return what became of each."""
        from airflow_provider_dstack._fleet_deletion import delete_fleet
        from airflow_provider_dstack._outcome import raise_as_airflow_error
        from dstack_core import DstackError as CoreError

        done: dict[str, str] = {}
        try:
            with self.hook().client(retry_budget=self.retry_budget) as client:
                for name, mark in self._fleets(client, context).items():
                    done[name] = delete_fleet(
                        client, name, mark, timeout=self.wait_timeout, sleep=self._sleep, log=self.log
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

    def _fleets(self, client: Client, context: Context) -> dict[str, str | None]:
        """Return the fleets to delete, and the mark of each. Raises ``AirflowFailException``."""
        from airflow_provider_dstack._compat import AirflowFailException

        if self.fleet_of is not None:
            return self._of_task(client, context)
        found: dict[str, str | None] = {}
        for name in [self.name] if isinstance(self.name, str) else self.name or ():
            # What a template makes of an XCom that is not there.
            if name in (None, "", "None"):
                continue
            fleet = client.fleets.get(name)
            owner = None if fleet is None else ResourceOwner.read(fleet.marker)
            if fleet is not None and (owner is None or owner.dag_id != context["ti"].dag_id):
                of = "no task of Airflow" if owner is None else f"task {owner}"
                raise AirflowFailException(
                    f"name: expected a fleet that this DAG created, got {name!r}, which {of} created. It was "
                    "left alone. Correct the name, or delete that fleet by hand."
                )
            found[name] = None if fleet is None else fleet.marker
        return found

    def _of_task(self, client: Client, context: Context) -> dict[str, str | None]:
        owner = ResourceOwner.of(context, "fleet", setup_id(context, "fleet_of", self.fleet_of))
        # Clearing a DAG run gives it another start, from which marks are drawn; its XComs stay.
        pulled = context["ti"].xcom_pull(task_ids=owner.task_id, key=FLEET_NAME_KEY)
        pushed = [pulled] if isinstance(pulled, str) else list(pulled or ())
        found = {fleet.name: fleet.marker for fleet in client.fleets.list() if _is_of(fleet, owner, pushed)}
        if not found:
            self.log.info("There is no fleet of task %s in project %s.", self.fleet_of, client.project)
        return found

    def _sleep(self, seconds: float) -> None:
        sleep_unless(lambda: self._killed, seconds, "the fleet was gone")


def _is_of(fleet: Fleet, wanted: ResourceOwner, pushed: Collection[str]) -> bool:
    """Return whether a fleet is that of the wanted task, or of a mapped instance of it.

    ``pushed`` are the names of fleets that the task pushed as XComs.
    """
    found = ResourceOwner.read(fleet.marker)
    if found is None or (wanted.map_index is not None and found.map_index != wanted.map_index):
        return False
    born = found.born if fleet.name in pushed else wanted.born
    return found == replace(wanted, born=born, map_index=found.map_index)
