"""Relay what a trigger sees of its run, and save how far that came.

The problem: all records of a triggerer pass through one process, so a trigger relays at a limited rate. A run
that writes faster is ahead of its trigger by megabytes when it ends, and its task must not wait for them.

The idea: while the relay is held up, a second flow watches for the end of the run. Once it has ended, the
trigger stops relaying: it fires, and the resumed task relays the rest on its worker, which has no such limit.
A trigger that keeps up never starts the second flow and relays the last lines itself.

Invariant: the position that is saved, or handed to the worker, is right behind the last line that was logged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._checkpoint import SECONDS_BETWEEN, Checkpoints
from airflow_provider_dstack._pace import Pace
from airflow_provider_dstack._relay import records

if TYPE_CHECKING:
    from airflow_provider_dstack._log_position import LogPosition
    from dstack_core import Event, Outcome
    from dstack_core.integration import LogRelay

# A triggerer needs about a second of processor time for a megabyte of log.
_BYTES_PER_SECOND = 100_000
# Reading takes about a fiftieth of that, also where the budget leaves the lines out.
_BYTES_READ_PER_SECOND = 5_000_000
_BURST_SECONDS = 5.0
# What Airflow's supervisor reads on a busy machine; on a quiet one ten times as much.
_BYTES_PASSED_PER_SECOND = 10_000
# A busy process is behind although the rate limit asks for no pause. Nobody notices a delay of a second.
_BEHIND_SECONDS = 1.0
# A follower that has read everything waits for its next poll; the next page comes sooner.
_GAP_SHARE = 0.5


class Watch:
    """The relay of one run's events at a limited rate.

    ``wait_for_end`` waits for the run's end and returns its outcome, None if it cannot be known. ``outcome``
    is set once the run has ended before its log was relayed.
    """

    def __init__(
        self,
        relay: LogRelay,
        position: LogPosition,
        checkpoints: Checkpoints,
        wait_for_end: Callable[[], Coroutine[Any, Any, Outcome | None]],
        *,
        poll_interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.relay = relay
        self.outcome: Outcome | None = None
        self._position = position
        self._checkpoints = checkpoints
        self._wait_for_end = wait_for_end
        self._clock = clock
        self._gap_seconds = _GAP_SHARE * poll_interval
        self._rate = Pace(_BURST_SECONDS, clock)
        self._in_pipe = Pace(0.0, clock)
        self._later: asyncio.TimerHandle | None = None
        self._end: asyncio.Task[Outcome | None] | None = None
        self._relayed_at = self._behind_since = clock()
        self._is_writing = False

    async def tell(self, event: Event, log: Any) -> bool:
        """Log an event; return False if the run has ended and the rest is better left to the worker."""
        from dstack_core import LogLines

        if isinstance(event, LogLines):
            self._note_gap()
            for number, (part, characters) in enumerate(self._position.new_parts(event)):
                if number:
                    self._offer()
                await self._write(part, log)
                self._position.relayed(part)
                await self._pace(characters / _BYTES_READ_PER_SECOND)
                if self.outcome is not None:
                    return False
        else:
            await self._write(event, log)
        self._relayed_at = self._clock()
        self._position.passed(event)
        self._offer()
        return True

    def keep_last(self) -> asyncio.Future[None] | None:
        """Have the last position saved; return the future of that, None when it is saved already."""
        last = self._checkpoints.last(self.state())
        return None if last is None else asyncio.wrap_future(last)

    def state(self) -> dict[str, Any]:
        """Return, JSON-plain, what another process continues with."""
        return {**self._position.to_dict(), **self.relay.state()}

    def recent_bytes(self) -> float:
        """Return how many bytes of what was logged Airflow may not have read yet."""
        return self._in_pipe.seconds_spent() * _BYTES_PASSED_PER_SECOND

    async def close(self) -> None:
        """Give up what was not saved yet, but for what ``keep_last`` began."""
        if self._later is not None:
            self._later.cancel()
        self._checkpoints.close()
        if self._end is not None:
            self._end.cancel()
            await asyncio.wait((self._end,))
            if not self._end.cancelled():
                self._end.exception()

    async def _write(self, event: Event, log: Any) -> None:
        # Half an event is counted by the relay and not by the position: it is not to be saved.
        self._is_writing = True
        for level, text in records(self.relay, event):
            log.log(level, text)
            self._in_pipe.wait_after(len(text) / _BYTES_PASSED_PER_SECOND)
            await self._pace(len(text) / _BYTES_PER_SECOND)
        self._is_writing = False

    def _offer(self) -> None:
        """Have the position saved, now or as soon as that may be: no further line may come."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._is_writing:
            return
        if not self._checkpoints.offer(self.state):
            self._later = asyncio.get_running_loop().call_later(SECONDS_BETWEEN, self._offer)

    async def _pace(self, cost: float) -> None:
        """Let the event loop run, and wait as long as the rate limit asks for, unless the run has ended."""
        pause = self._rate.wait_after(cost)
        if self.outcome is not None:
            await asyncio.sleep(0)
            return
        if self._end is None and (pause or self._clock() - self._behind_since > _BEHIND_SECONDS):
            self._end = asyncio.create_task(self._wait_for_end())
        if self._end is None:
            await asyncio.sleep(0)
            return
        sleeping = asyncio.ensure_future(asyncio.sleep(pause))
        try:
            await asyncio.wait((sleeping, self._end), return_when=asyncio.FIRST_COMPLETED)
            if self._end.done():
                # If the end cannot be watched for, the follower reports why.
                self.outcome = None if self._end.exception() else self._end.result()
            if self.outcome is None:
                await sleeping
        finally:
            sleeping.cancel()

    def _note_gap(self) -> None:
        """Stop watching for the end if the follower has waited: it had relayed all there was."""
        now = self._clock()
        if now - self._relayed_at < self._gap_seconds:
            return
        self._behind_since = now
        if self._end is not None and not self._end.done():
            self._end.cancel()
            self._end = None
