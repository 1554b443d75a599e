"""Wait in the triggerer until a service answers, and relay its log until then."""

from __future__ import annotations

import asyncio
from typing import Any

from airflow_provider_dstack._threads import in_thread
from airflow_provider_dstack.hooks import DstackHook
from airflow_provider_dstack.triggers import DstackRunTrigger, ignore

READY = "ready"
"""The kind of the event of a service that answers."""


class DstackServiceTrigger(DstackRunTrigger):
    """The follower of one service in the triggerer: it fires once the service answers, or its run has ended.

    The event's payload is for ``DstackServiceOperator.execute_complete``. Arguments, log, and what happens
    when the task is ended are those of ``DstackRunTrigger``.
    """

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments to make this trigger again in another process."""
        _, arguments = super().serialize()
        return "airflow_provider_dstack.service_trigger.DstackServiceTrigger", arguments

    async def _follow(self) -> dict[str, Any]:
        following = asyncio.create_task(super()._follow())
        answering = asyncio.create_task(self._wait_for_answer())
        try:
            await asyncio.wait([following, answering], return_when=asyncio.FIRST_COMPLETED)
            # A run that has ended answers no more, whatever it did before.
            if not following.done():
                event = await answering
                if event is not None:
                    return event
            return await following
        finally:
            following.cancel()
            answering.cancel()
            await asyncio.gather(following, answering, return_exceptions=True)

    async def _wait_for_answer(self) -> dict[str, Any] | None:
        """Return the event of a service that answers; None where that cannot be known any more.

        The follower of its run finds out the reason.
        """
        from dstack_core import DstackError

        hook = DstackHook(self.dstack_conn_id, self.project_name)
        try:
            async with await in_thread(lambda: hook.async_client(retry_budget=self.retry_budget)) as client:
                run = await client.runs.get(self.run_name, on_event=ignore)
                if run is None or self._run_id not in (None, run.id):
                    return None
                url = await run.wait_until_ready(
                    poll_interval=self.poll_interval, retry_budget=self.retry_budget
                )
                link = run.browser_service_url or url
        except DstackError:
            return None
        return {"kind": READY, "run_name": self.run_name, "service_url": url, "link": link}
