"""Wait for a run that something else started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseSensorOperator, PokeReturnValue

from airflow_provider_dstack._compat import AirflowSkipException, conf
from airflow_provider_dstack._parameters import yes_or_no
from airflow_provider_dstack.errors import DstackRunError
from airflow_provider_dstack.links import (
    OUTCOME_KEY,
    RUN_NAME_KEY,
    RUN_URL_KEY,
    DstackRunLink,
    leave_pushed,
    push,
)

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack.hooks import DstackHook
    from dstack_core import RunStatus


class DstackRunSensor(BaseSensorOperator):
    """A sensor that waits until a run that was started elsewhere reaches a status.

    A run that ends without having reached one fails the sensor at once. A status that passes between two
    polls is not seen. The run is never stopped, whatever happens to the sensor.

    Args:
        run_name: The run's name.
        statuses: A status or a list (``RunStatus`` or str). Default ``"done"``.
        wait_for_run: Wait for a run that does not exist yet; with False that fails the sensor. Default True.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        deferrable: Have the triggerer wait, and give the worker's slot back. Default: Airflow's setting
            ``[operators] default_deferrable``.
        poke_interval: Seconds or a ``timedelta`` between two polls. Default 30.
        **kwargs: As for Airflow's sensors. ``mode`` is ``"poke"`` or ``"reschedule"``. Until ``timeout``
            (seconds) an unreachable server is retried.

    Returns:
        A dict: ``run_name``, ``status``, ``url``, and ``outcome`` (as ``DstackRunOperator`` returns it) for a
        run that has ended, else None.

    Raises:
        AirflowFailException: The connection is wrong, or with ``wait_for_run=False`` there is no such run.
        DstackRunError: The run ended without a wanted status. If it did not succeed, one of
            ``DstackRunFailed``, ``DstackNoCapacity`` and ``DstackRunStopped``.

    Example:
        ``DstackRunSensor(task_id="wait", run_name="train-3b0f92", mode="reschedule")``

    Source: Airflow documentation, "Sensors".
    """

    template_fields: Sequence[str] = ("run_name", "statuses", "dstack_conn_id", "project_name")
    operator_extra_links = (DstackRunLink(),)
    ui_color = "#e8e4ff"

    def __init__(
        self,
        *,
        run_name: str,
        statuses: RunStatus | str | Sequence[RunStatus | str] = "done",
        wait_for_run: bool = True,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poke_interval: timedelta | float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, **kwargs)
        self.run_name = run_name
        self.statuses = [statuses] if isinstance(statuses, str) else list(statuses)
        if not self.statuses:
            raise ValueError("statuses: expected one status or more, such as 'done', got an empty list.")
        self.wait_for_run = yes_or_no("wait_for_run", wait_for_run)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.deferrable = yes_or_no("deferrable", deferrable)

    def execute(self, context: Context) -> Any:
        """Wait in the worker, or have the triggerer wait."""
        leave_pushed(self)
        if not self.deferrable:
            return super().execute(context)
        # The worker polls first: an event that comes before the scheduler has seen the deferral fails the
        # task.
        found = self.poke(context)
        if not found:
            self._defer()
        return found.xcom_value if isinstance(found, PokeReturnValue) else None

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the trigger saw, or raise the error that it reported."""
        leave_pushed(self)
        if event["kind"] != "seen":
            from airflow_provider_dstack._outcome import broken_error

            raise broken_error(event)
        sight: dict[str, Any] = event["sight"]
        self._announce(context, sight)
        self._is_reached(sight)
        return sight

    def poke(self, context: Context) -> bool | PokeReturnValue:
        """Poll the run once."""
        from airflow_provider_dstack._outcome import as_airflow_error
        from airflow_provider_dstack.status_trigger import not_there, sight_of
        from dstack_core import DstackError as CoreError
        from dstack_core import ServerUnreachableError

        try:
            with self.hook().client(retry_budget=0.0) as client:
                run = client.runs.get(self.run_name)
                if run is None and not self.wait_for_run:
                    raise not_there(self.run_name, client.project)
        except ServerUnreachableError as error:
            self.log.warning("%s Polling again.", error.message)
            return False
        except CoreError as error:
            raise as_airflow_error(error, submitted=False) from error
        if run is None:
            self.log.info("There is no run %s yet.", self.run_name)
            return False
        sight = sight_of(run)
        self.log.info("Run %s is %s: %s", run.name, sight["status"], run.url)
        self._announce(context, sight)
        return PokeReturnValue(True, sight) if self._is_reached(sight) else False

    def hook(self) -> DstackHook:
        """Return the hook of this sensor's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _defer(self) -> NoReturn:
        from airflow_provider_dstack.status_trigger import DstackStatusTrigger

        trigger = DstackStatusTrigger(
            dstack_conn_id=self.dstack_conn_id,
            project_name=self.project_name,
            run_name=self.run_name,
            statuses=self._wanted(),
            poll_interval=self.poke_interval,
            wait_for_run=self.wait_for_run,
        )
        limit = timedelta(seconds=self.timeout)
        self.defer(trigger=trigger, method_name="execute_complete", timeout=limit)

    def _is_reached(self, sight: Mapping[str, Any]) -> bool:
        from airflow_provider_dstack.status_trigger import is_reached

        try:
            return is_reached(sight, self._wanted())
        except DstackRunError as error:
            # Airflow itself does this for a deferred sensor only.
            if self.soft_fail or self.never_fail:
                raise AirflowSkipException(str(error)) from error
            raise

    def _wanted(self) -> list[str]:
        """Return the statuses as plain texts: a trigger is kept in Airflow's database."""
        return [str(status) for status in self.statuses]

    def _announce(self, context: Context, sight: Mapping[str, Any]) -> None:
        """Put the run's address where the link finds it while the sensor still waits."""
        push(context["ti"], RUN_NAME_KEY, sight["run_name"], self.log)
        push(context["ti"], RUN_URL_KEY, sight["url"], self.log)
        if sight["outcome"] is not None and sight["status"] != "done":
            push(context["ti"], OUTCOME_KEY, sight["outcome"], self.log)
