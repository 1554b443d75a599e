"""Spend something at a bearable rate."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Tell who spends much how long to wait; after a quiet time ``burst_seconds`` of waiting are let off."""

    def __init__(self, burst_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst_seconds = burst_seconds
        self._clock = clock
        self._paid_until = clock() - burst_seconds

    def wait_after(self, seconds: float) -> float:
        """Return how long to wait, now that what is worth ``seconds`` of waiting was spent."""
        now = self._clock()
        self._paid_until = max(self._paid_until, now - self._burst_seconds) + seconds
        return max(0.0, self._paid_until - now)

    def seconds_spent(self) -> float:
        """Return how much was spent lately that time has not made up for yet."""
        return max(0.0, self._paid_until - self._clock() + self._burst_seconds)
