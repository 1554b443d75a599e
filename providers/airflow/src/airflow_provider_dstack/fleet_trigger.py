"""Wait in the triggerer until a fleet has its machines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dstack._compat import task_state, trigger_has_on_kill
from airflow_provider_dstack._fleet_wait import LOST, READY, WAITING, FleetSight, sight_of_fleet
from airflow_provider_dstack._outcome import broken_event
from airflow_provider_dstack._shared_polls import seconds_to_turn, shared_polls
from airflow_provider_dstack._threads import in_thread
from airflow_provider_dstack.hooks import DstackHook

if TYPE_CHECKING:
    from dstack_core import AsyncClient, Fleet

TIMED_OUT = "timed_out"
# Airflow gives up a trigger's on_kill after 30 s; the rest of that is for its own work.
_DELETE_SECONDS = 20.0


class DstackFleetTrigger(BaseTrigger):
    """The poller of one fleet in the triggerer: it fires once the fleet has its machines, or never will.

    Triggers of one project that poll in the same moment share one request. An unreachable server is retried
    until the deadline. The fleet of a task that a user ends is deleted. No argument is a secret.

    Args:
        dstack_conn_id: As for ``DstackHook``.
        project_name: As for ``DstackHook``.
        name: The fleet's name.
        mark: The owner's mark that the fleet carries.
        machines: How many machines to wait for.
        poll_interval: Seconds between two polls.
        deadline: When to give up, in seconds since the epoch; None for never.
        not_before: The earliest time of the event, in seconds since the epoch. Default 0.

    Source: Airflow documentation, "Deferrable Operators & Triggers".
    """

    def __init__(
        self,
        *,
        dstack_conn_id: str,
        project_name: str | None,
        name: str,
        mark: str,
        machines: int,
        poll_interval: float,
        deadline: float | None,
        not_before: float = 0.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.name = name
        self.mark = mark
        self.machines = machines
        self.poll_interval = poll_interval
        self.deadline = deadline
        self.not_before = not_before
        self._fired = False

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments to make this trigger again in another process."""
        names = ("dstack_conn_id", "project_name", "name", "mark", "machines", "poll_interval", "deadline")
        return (
            "airflow_provider_dstack.fleet_trigger.DstackFleetTrigger",
            {name: getattr(self, name) for name in (*names, "not_before")},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the one event: the machines are there, or why they will not be."""
        from airflow_provider_dstack import triggers
        from dstack_core import clock

        try:
            payload = await self._poll()
        except Exception as error:
            payload = broken_event(error)
        held = min(max(0.0, self.not_before - clock.epoch()), triggers._LONGEST_HOLD_SECONDS)
        await clock.asleep(held)
        self._fired = True
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def on_kill(self) -> None:
        """Delete the fleet of a task that a user ended."""
        await self._kill(delete_when_unknown=True)

    async def cleanup(self) -> None:
        """Do the work of ``on_kill`` on Airflow before 3.3, which does not call that; else nothing."""
        if not trigger_has_on_kill():
            await self._kill(delete_when_unknown=False)

    async def _poll(self) -> dict[str, Any]:
        from dstack_core import ServerUnreachableError, clock

        shown = ""
        async with await in_thread(self._connect) as client:
            while True:
                sight = FleetSight(WAITING, shown)
                try:
                    sight = await self._sight(client)
                except ServerUnreachableError as error:
                    self.log.warning("%s Polling again.", error.message)
                if sight.text != shown:
                    shown = sight.text
                    self.log.info("%s", shown)
                if sight.state in (READY, LOST):
                    return {"kind": sight.state, "text": sight.text}
                left = float("inf") if self.deadline is None else self.deadline - clock.epoch()
                if left <= 0:
                    return {"kind": TIMED_OUT, "text": shown}
                await clock.asleep(min(seconds_to_turn(self.poll_interval, clock.epoch()), left))

    async def _sight(self, client: AsyncClient) -> FleetSight:
        question = ("fleets", client.server_url, client.project)
        fleets: list[Fleet] = await shared_polls().ask(question, client.fleets.list)
        found = next((each for each in fleets if each.name == self.name), None)
        return sight_of_fleet(self.name, self.mark, found, self.machines)

    def _connect(self) -> AsyncClient:
        """Look the connection up, which blocks."""
        return DstackHook(self.dstack_conn_id, self.project_name).async_client(retry_budget=0.0)

    async def _kill(self, *, delete_when_unknown: bool) -> None:
        if self._fired:
            return
        loop = asyncio.get_running_loop()
        deleting = in_thread(lambda: self._delete_if_ended(delete_when_unknown), "stop", 8)
        deadline = loop.time() + _DELETE_SECONDS
        while not deleting.done() and loop.time() < deadline:
            try:
                await asyncio.wait([deleting], timeout=deadline - loop.time())
            except asyncio.CancelledError:
                # Airflow cancels this again every second; the deletion continues.
                continue

    def _delete_if_ended(self, delete_when_unknown: bool) -> None:
        from airflow_provider_dstack._fleet_deletion import delete_own

        try:
            state = task_state(self.task_instance) if self.task_instance is not None else None
        except Exception as error:
            if not delete_when_unknown:
                self.log.warning("Could not get the task's state (%r). Fleet %s is kept.", error, self.name)
                return
        else:
            if state == "deferred":
                # Another triggerer has taken this trigger over.
                return
        delete_own(
            DstackHook(self.dstack_conn_id, self.project_name),
            self.name,
            self.mark,
            timeout=_DELETE_SECONDS,
            log=self.log,
        )
