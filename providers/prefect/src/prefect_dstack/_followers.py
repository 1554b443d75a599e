"""Whether a process still follows a run whose flow run has ended: for the reaper.

The problem: Prefect lets submitted tasks finish after their flow run has ended, and so their runs are left
alone. But if a worker of Dask or Ray is killed and its task is not repeated, the task run stays Running, too,
and its run would keep running until its ``max_duration``.

The idea: a task that follows a run reads the state of its flow run anyway. Once that has ended, it emits an
event every ``BEAT_SECONDS``. A run that was followed, and without such an event for ``SILENT_SECONDS``, has
no follower. While a flow run is active, nothing is emitted.

The invariants: a run that no task began to follow is not judged here, since a task may hold it without
following it. Only a Prefect server without the events of ``SILENT_SECONDS`` makes a living follower look
dead.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from prefect_dstack._report import was_emitted

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect.client.orchestration import SyncPrefectClient

# One row in Prefect's database each time; only of runs that outlast their flow run.
BEAT_SECONDS = 30.0
# Twenty of them: an outage of the Prefect server, or a dstack server with slow replies, must not stop a run.
SILENT_SECONDS = 600.0
_ALIVE = "dstack.follower.alive"


class Heartbeat:
    """The events of a task that follows a run beyond the end of its flow run."""

    def __init__(self, logger: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._emitted_at: float | None = None

    def emit(self, run_id: str) -> None:
        """Emit one if the last one is ``BEAT_SECONDS`` old; what Prefect raises is logged."""
        now = self._clock()
        if self._emitted_at is not None and now < self._emitted_at + BEAT_SECONDS:
            return
        self._emitted_at = now
        try:
            # Imported here: what imports a flow's module must not load it.
            from prefect.events import emit_event

            # A resource of its own: automations for the events of a run do not see it.
            emit_event(_ALIVE, resource={"prefect.resource.id": _resource(run_id)})
        except Exception as error:
            self._logger.debug("Prefect did not take an event: %s", error)


def has_lost_its_follower(api: SyncPrefectClient, run_id: str, ended_seconds: float) -> bool:
    """Whether a task began to follow the run, and none has since its flow run ended.

    ``ended_seconds`` is how long ago that was. Raises what Prefect's client raises.
    """
    from prefect.events.filters import (
        EventFilter,
        EventNameFilter,
        EventOccurredFilter,
        EventResourceFilter,
    )

    if ended_seconds < SILENT_SECONDS or not was_emitted(api, "started", run_id):
        return False
    since = datetime.now(UTC) - timedelta(seconds=SILENT_SECONDS)
    chosen = EventFilter(
        event=EventNameFilter(name=[_ALIVE]),
        occurred=EventOccurredFilter.model_validate({"since": since}),
        resource=EventResourceFilter(id=[_resource(run_id)]),
    )
    return not api.read_events(chosen, limit=1).events


def _resource(run_id: str) -> str:
    return f"dstack.follower.{run_id}"
