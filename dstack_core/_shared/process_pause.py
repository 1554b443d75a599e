"""Notice that this process was paused: a stopped process, a suspended machine, a blocked event loop.

The problem: while a process stands still, another one may take over its runs. When it continues, what it
reads next would be reported by both.

The idea: a timer compares the clock with when it should have fired. After a pause that is long enough for a
take-over, replies are held back for ``PAUSE_SECONDS``. In that time the other process, or Airflow, can cancel
the followers here.

Invariants: one timer per loop, however many followers. No reply is held back for longer than
``PAUSE_SECONDS``.
"""

from __future__ import annotations

import asyncio
import time

# Often enough to detect every pause of PAUSE_SECONDS, and rare enough to cost nothing. A pause counts from
# the next beat on, so a longer beat would miss pauses that begin just after one.
_BEAT_SECONDS = 1.0
# Airflow lets another triggerer take over after 30 s without a heartbeat, part of which a paused one may have
# missed before. A shorter limit holds replies back on a merely busy machine; with a longer one a take-over is
# missed, and log lines come twice.
PAUSE_SECONDS = 8.0


class PauseGuard:
    """A guard that holds replies back right after a pause of this process."""

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
        """Stop watching the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def hold(self) -> None:
        """Wait until the last pause is long enough ago."""
        # Bounded, since the wall clock may be set back.
        left = self._free_at - time.time()
        if left > 0:
            await asyncio.sleep(min(left, PAUSE_SECONDS))

    def _beat(self) -> None:
        # The wall clock: the monotonic one stands still on a machine that is suspended.
        now = time.time()
        if now > self._expected + PAUSE_SECONDS:
            self._free_at = now + PAUSE_SECONDS
        self._expected = now + _BEAT_SECONDS
        self._timer = asyncio.get_running_loop().call_later(_BEAT_SECONDS, self._beat)
