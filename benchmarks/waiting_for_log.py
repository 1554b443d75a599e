"""A deferred task that ends only after its trigger has relayed the whole log, as in earlier versions."""

from __future__ import annotations

from typing import Any

from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import AsyncClient, Outcome


class WaitingTrigger(DstackRunTrigger):
    """A trigger that does not see the end of its run before the log is relayed."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return its class and arguments."""
        return "benchmarks.waiting_for_log.WaitingTrigger", super().serialize()[1]

    async def _wait_for_end(self, client: AsyncClient, run_id: str) -> Outcome | None:
        return None


class WaitingOperator(DstackRunOperator):
    """An operator that defers to that trigger."""

    def defer(self, *, trigger: Any, **arguments: Any) -> Any:
        """Defer to that trigger."""
        super().defer(trigger=WaitingTrigger(**trigger.serialize()[1]), **arguments)
