"""Notice that this process stood still: a stopped process, a suspended machine, a blocked event loop."""

from __future__ import annotations

import asyncio
import time

_BEAT_SECONDS = 1.0
STALL_SECONDS = 8.0


class StallGuard:
    """Hold back what comes right after a stall.

    Another process may have taken this one's watching over meanwhile. Whoever cancels it here then gets
    as long as the shortest stall that counts.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._expected = 0.0
        self._free_at = 0.0

    def start(self) -> None:
        """Watch the running loop until ``stop``."""
        if self._timer is None:
            self._expected = time.time()
            self._beat()

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def hold(self) -> None:
        """Wait until a stall is long enough ago."""
        left = self._free_at - time.time()
        if left > 0:
            await asyncio.sleep(min(left, STALL_SECONDS))

    def _beat(self) -> None:
        # The clock on the wall: the other one stands still on a machine that is suspended.
        now = time.time()
        if now > self._expected + STALL_SECONDS:
            self._free_at = now + STALL_SECONDS
        self._expected = now + _BEAT_SECONDS
        self._timer = asyncio.get_running_loop().call_later(_BEAT_SECONDS, self._beat)
