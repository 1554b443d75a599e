"""Tell what a trigger sees of its run, and have it kept how far that came."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._checkpoint import SECONDS_BETWEEN, Checkpoints
from airflow_provider_dstack._pace import Pace
from airflow_provider_dstack._relay import records

if TYPE_CHECKING:
    from dstack_core import Event, Progress
    from dstack_core.integration import LogRelay

# A triggerer needs about a second of processor time for a megabyte of log.
_BYTES_PER_SECOND = 100_000
_BURST_SECONDS = 5.0


class Watch:
    """Relay the events of one run, at a bearable rate, and have it kept how far that came."""

    def __init__(self, relay: LogRelay, progress: Progress, checkpoints: Checkpoints) -> None:
        self.relay = relay
        self._checkpoints = checkpoints
        self._progress = progress
        self._rate = Pace(_BURST_SECONDS)
        self._later: asyncio.TimerHandle | None = None

    async def tell(self, event: Event, log: Any) -> None:
        """Write an event to the log."""
        for level, text in records(self.relay, event):
            log.log(level, text)
            await self._pace(len(text))
        self._progress = event.progress
        self._offer()

    def keep_last(self) -> asyncio.Future[None] | None:
        """Have it kept that all was told; return the future of that, None when it is kept already."""
        last = self._checkpoints.last(self._state())
        return None if last is None else asyncio.wrap_future(last)

    def close(self) -> None:
        """Give up what was not kept yet, but for what ``keep_last`` began."""
        if self._later is not None:
            self._later.cancel()
        self._checkpoints.close()

    def _offer(self) -> None:
        """Have it kept how far this came, now or as soon as that may be: no further line may come."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if not self._checkpoints.offer(self._state):
            self._later = asyncio.get_running_loop().call_later(SECONDS_BETWEEN, self._offer)

    async def _pace(self, size: int) -> None:
        # Records go to the triggerer's supervisor; a flood of them must not starve the loop nor that.
        await asyncio.sleep(self._rate.wait_after(size / _BYTES_PER_SECOND))

    def _state(self) -> dict[str, Any]:
        return {"progress": self._progress.to_dict(), **self.relay.state()}
