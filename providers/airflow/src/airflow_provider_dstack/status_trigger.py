"""Wait in the triggerer until a run shows a status; the sensor judges what a poll showed in the same way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dstack._outcome import broken_event, result_of
from airflow_provider_dstack._threads import in_thread
from airflow_provider_dstack.errors import AirflowFailException, DstackRunError
from airflow_provider_dstack.hooks import DstackHook

if TYPE_CHECKING:
    from dstack_core import AsyncClient, AsyncRun, Run


class DstackStatusTrigger(BaseTrigger):
    """The poller of one run in the triggerer: it fires once the run has ended or shows one of ``statuses``.

    The event's payload is for ``DstackRunSensor.execute_complete``. An unreachable server is retried; the
    sensor's ``timeout`` is the limit. The run is never stopped. No argument is a secret.

    Args:
        dstack_conn_id: As for ``DstackHook``.
        project_name: As for ``DstackHook``.
        run_name: The run's name.
        statuses: The statuses to wait for, as plain texts.
        poll_interval: Seconds between two polls.
        wait_for_run: Wait for a run that does not exist yet, instead of failing. Default True.

    Source: Airflow documentation, "Deferrable Operators & Triggers".
    """

    def __init__(
        self,
        *,
        dstack_conn_id: str,
        project_name: str | None,
        run_name: str,
        statuses: Sequence[str],
        poll_interval: float,
        wait_for_run: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.run_name = run_name
        self.statuses = list(statuses)
        self.poll_interval = poll_interval
        self.wait_for_run = wait_for_run

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments to make this trigger again in another process."""
        return (
            "airflow_provider_dstack.status_trigger.DstackStatusTrigger",
            {
                "dstack_conn_id": self.dstack_conn_id,
                "project_name": self.project_name,
                "run_name": self.run_name,
                "statuses": self.statuses,
                "poll_interval": self.poll_interval,
                "wait_for_run": self.wait_for_run,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the one event: what the run showed, or why it can no longer be watched."""
        try:
            payload = await self._poll_until_reached()
        except Exception as error:
            payload = broken_event(error)
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def _poll_until_reached(self) -> dict[str, Any]:
        from dstack_core import ServerUnreachableError, clock

        async with await in_thread(self._connect) as client:
            while True:
                # The worker has polled just now.
                await clock.asleep(self.poll_interval)
                try:
                    run = await client.runs.get(self.run_name)
                except ServerUnreachableError as error:
                    self.log.warning("%s Polling again.", error.message)
                    continue
                if run is None and not self.wait_for_run:
                    raise not_there(self.run_name, client.project)
                if run is not None:
                    sight = sight_of(run)
                    if sight["outcome"] is not None or sight["status"] in self.statuses:
                        return {"kind": "seen", "sight": sight}

    def _connect(self) -> AsyncClient:
        """Look the connection up, which blocks."""
        return DstackHook(self.dstack_conn_id, self.project_name).async_client(retry_budget=0.0)


def sight_of(run: Run | AsyncRun) -> dict[str, Any]:
    """Return, JSON-plain, what a poll showed of a run; ``outcome`` is None while it runs."""
    from dstack_core.integration import outcome_dict

    outcome = run.outcome()
    return {
        "run_name": run.name,
        "status": str(run.last_status),
        "url": run.url,
        "outcome": None if outcome is None else outcome_dict(outcome),
    }


def is_reached(sight: Mapping[str, Any], statuses: Collection[str]) -> bool:
    """Return whether the run shows one of ``statuses``; raise when it has ended and never will.

    Raises ``DstackRunFailed``, ``DstackNoCapacity``, ``DstackRunStopped``, or ``DstackRunError``.
    """
    from dstack_core import Outcome

    if sight["status"] in statuses:
        return True
    if sight["outcome"] is None:
        return False
    result_of(Outcome.from_dict(sight["outcome"]), (), retry_option=None)
    raise DstackRunError(
        f"Run {sight['run_name']} ended as {sight['status']} and was not seen as {' or '.join(statuses)}. "
        f"Add {sight['status']!r} to statuses if that is good too. See {sight['url']}",
        sight["outcome"],
    )


def not_there(run_name: str, project: str) -> AirflowFailException:
    """Return the error for a run that a sensor does not wait for."""
    return AirflowFailException(
        f"run_name: expected a run of project {project}, got {run_name!r}, which does not exist. Correct the "
        "name, or pass wait_for_run=True to wait for it."
    )
