"""Stop the runs that their tasks left behind: for a DAG on a schedule."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import BaseOperator
from airflow_provider_dstack._parameters import at_least, yes_or_no
from airflow_provider_dstack.errors import DstackError, DstackRunInterrupted

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack.hooks import DstackHook

# How late a kill ends the wait for the second check.
_TICK_SECONDS = 0.2


class DstackReapOperator(BaseOperator):
    """An operator that stops runs whose task has ended, deletes what their DAG run left, and returns both.

    Meant for a maintenance DAG on a schedule. It lists the active runs of the project, asks Airflow about
    the task instance of each, and stops the runs of those that have ended. Runs of tasks that have not ended,
    of other Airflows and of anything else are left alone. Fleets that ``DstackFleetOperator`` created, and
    secrets that ``DstackSecretsOperator`` set, are deleted once their DAG run has ended. Volumes are never
    deleted.

    Args:
        dry_run: Report what would be stopped, and stop nothing. Default False.
        min_age: Seconds that a task must have ended before its run is stopped, because a task stops its run
            itself. When a run is found, the task waits that long and checks again. Default 60.
        stop_unknown: Also stop runs, and delete fleets and secrets, of task instances that this Airflow does
            not know, or whose DAG run was cleared after it had ended. They may be another Airflow's that
            shares the project. Default False.
        stop_services: Also stop services whose task succeeded, once their DAG run has ended. Default False.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        A list of dicts, one for each active run of an Airflow task: ``run_name``, ``url``,
        ``task_instance`` (``dag/run/task[map_index]``), ``try_number``, ``state``, ``action`` (``"stopped"``,
        ``"would stop"``, ``"left"`` or ``"not stopped"``) and ``reason``. Then one for each fleet of an
        Airflow task: ``fleet_name``, ``task_instance``, ``state`` (of the DAG run), ``action``
        (``"deleted"``, ``"would delete"``, ``"left"`` or ``"not deleted"``) and ``reason``. Then one for each
        project secret of a DAG run: ``secret_name``, ``dag_run`` (``dag/run``), ``state``, ``action`` and
        ``reason``, likewise.

    Raises:
        AirflowFailException: The connection is wrong.
        DstackServerUnreachable: The dstack server did not answer; nothing was stopped.
        DstackError: Airflow did not answer, and nothing was stopped; or some runs could not be stopped, which
            the message names. The others are stopped.

    Example:
        ``DstackReapOperator(task_id="reap", min_age=300)``
    """

    template_fields: Sequence[str] = ("dstack_conn_id", "project_name")
    ui_color = "#ffe4e1"

    def __init__(
        self,
        *,
        dry_run: bool = False,
        min_age: float = 60.0,
        stop_unknown: bool = False,
        stop_services: bool = False,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # BaseOperator has a method dry_run.
        self._dry_run = yes_or_no("dry_run", dry_run)
        self.min_age = at_least("min_age", min_age, 0.0)
        self.stop_unknown = yes_or_no("stop_unknown", stop_unknown)
        self.stop_services = yes_or_no("stop_services", stop_services)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self._killed = False

    def execute(self, context: Context) -> list[dict[str, Any]]:
        """Find, stop and report."""
        from dataclasses import asdict

        from airflow_provider_dstack._compat import worker_task
        from airflow_provider_dstack._outcome import as_airflow_error
        from airflow_provider_dstack._reap import ReapOptions, failure, reap, summary
        from airflow_provider_dstack._reap_secrets import reap_resources, resource_failures
        from dstack_core import DstackError as CoreError

        options = ReapOptions(self._dry_run, self.min_age, self.stop_unknown, self.stop_services)
        try:
            with self.hook().client() as client:
                findings = reap(client, worker_task, options, log=self.log, pause=self._pause)
                self.log.info("%s", summary(findings, client.project))
                resources = reap_resources(
                    client,
                    worker_task,
                    dry_run=options.dry_run,
                    stop_unknown=options.stop_unknown,
                    log=self.log,
                )
        except CoreError as error:
            raise as_airflow_error(error, submitted=False) from error
        problems = [failure(findings) or "", *resource_failures(resources)]
        if any(problems):
            raise DstackError(" ".join(filter(None, problems)))
        return [*map(asdict, findings), *map(asdict, resources)]

    def on_kill(self) -> None:
        """End the wait for the second check; nothing is stopped then."""
        self._killed = True

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._killed and time.monotonic() < end:
            time.sleep(min(_TICK_SECONDS, seconds))
        if self._killed:
            raise DstackRunInterrupted("The task was ended before its second check. No run was stopped.")
