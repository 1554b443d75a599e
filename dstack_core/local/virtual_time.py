"""Virtual time: waits take no time, and work takes the time that it takes.

The problem: with a clock that is simply faster, every time limit becomes a race against the machine. At a
factor of 1800 the 30 s that a client retries for are 17 ms, and a busy machine fails tests at random.

The idea: time runs as usual while there is work, and jumps to the end of the next wait as soon as all code
waits. So an hour of retries takes as long as its requests, and no limit passes only because the machine is
slow. What waits and works is the code that uses ``dstack_core.clock``, the requests of an embedded server,
and its jobs.

The rules for a jump, checked by one thread:

1. A client, an operator or a task waits. The timers of a server alone do not count, or time would run away
   while a test computes.
2. No work holds the clock: no request is being answered, no job's process runs.
3. All threads and tasks that waited before wait again, or have ended, or both have been so for
   `_QUIET_SECONDS`: one that was just woken has not yet sent its request. A wait for an event does not show
   which task continues after it, such as the rounds of a shared client, so these seconds always follow it.

What was woken in an event loop also holds the clock for `_TURNS` turns of that loop: a server's coroutine
that was woken reaches its next wait in that time, however busy the machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from dstack_core import clock

# Seconds. A woken thread sends its request within 1 ms. On a busy machine it may take longer; if another one
# waits meanwhile, the clock then jumps once too early, which the thread sees as a slow network. A longer time
# is added to each wait: an hour of polls every 10 s has 360.
_QUIET_SECONDS = 0.003
# A coroutine of the server takes up to ten turns from a timer to its next wait. More cost microseconds, fewer
# let time jump in between.
_TURNS = 24

_Waiter = threading.Thread | asyncio.Task[Any]


class _Entry:
    """One wait; ``waiter`` is the thread or task that waits, None if that is not known."""

    __slots__ = ("caller", "is_over", "until", "waiter", "wake")

    def __init__(
        self, until: float, wake: Callable[[], None], *, caller: bool, waiter: _Waiter | None
    ) -> None:
        self.until = until
        self.wake = wake
        self.waiter = waiter
        self.caller = caller
        self.is_over = False


class VirtualTime:
    """A clock that jumps over waits: an hour of retries plays in a second or two.

    Use it as a context manager around a test, together with `LocalServer`. Durations, timestamps, costs and
    time limits are in virtual time. Time passes as usual while a request is answered or a job's process runs.
    A ``sleep`` command of a job waits in virtual time, everything else in a job takes real time. The limits
    of a single request (``timeout``, ``connect_timeout``) stay real.

    Only this process is affected. A workflow engine's own timers are not: Airflow's ``retry_delay``,
    ``execution_timeout`` and Prefect's ``retry_delay_seconds`` take real time.

    Example:
        >>> with VirtualTime() as time, LocalServer() as server, server.client() as client:
        ...     server.scenarios.capacity_after(3600)
        ...     run = client.runs.submit(task)  # retries on no-capacity
        ...     run.wait()
        ...     assert time.passed > 3600
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._entries: list[tuple[float, int, _Entry]] = []
        self._numbers = itertools.count()
        self._callers = 0
        self._unknown = 0
        self._awake: set[_Waiter] = set()
        self._holds = 0
        self._offset = 0.0
        self._active_at = 0.0
        self._started_at = 0.0
        self._is_running = False
        self._thread: threading.Thread | None = None
        self._stack = contextlib.ExitStack()

    def __repr__(self) -> str:
        return f"VirtualTime({'running' if self._is_running else 'not running'}, {self.passed:.1f} s passed)"

    def __enter__(self) -> Self:
        if self._is_running:
            raise RuntimeError("The virtual time is already running.")
        self._is_running = True
        self._started_at = self.monotonic()
        self._thread = threading.Thread(target=self._advance, name="dstack-virtual-time", daemon=True)
        self._thread.start()
        self._stack.enter_context(clock.install(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        with self._condition:
            self._is_running = False
            # What still waits continues at once: nothing else would wake it.
            for *_position, entry in self._entries:
                self._wake(entry)
            self._entries.clear()
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    @property
    def passed(self) -> float:
        """Return the virtual seconds since the start."""
        return self.monotonic() - self._started_at if self._thread is not None else 0.0

    @property
    def skipped(self) -> float:
        """Return how many of the seconds that passed were jumped over."""
        return self._offset

    def sleep(self, seconds: float) -> None:
        """Let virtual seconds pass: the test waits, and so lets time jump. Raises ValueError below 0."""
        if not seconds >= 0:
            raise ValueError(f"sleep: expected seconds of 0 or more, got {seconds!r}.")
        self.wait(self.monotonic() + seconds)

    # What ``clock.Clock`` asks for.

    def monotonic(self) -> float:
        """Return the machine's monotonic seconds and what was jumped over."""
        return time.monotonic() + self._offset

    def epoch(self) -> float:
        """Return the machine's seconds since 1970 and what was jumped over."""
        return time.time() + self._offset

    def wait(self, until: float, longest: float | None = None) -> None:
        """Block until virtual time is `until`, for at most `longest` real seconds."""
        woken = threading.Event()
        entry = _Entry(until, woken.set, caller=True, waiter=threading.current_thread())
        self._add(entry)
        try:
            woken.wait(longest)
        finally:
            self._remove(entry)

    async def await_(
        self, until: float, longest: float | None = None, *, caller: bool = True, in_task: bool = True
    ) -> None:
        """Wait like `wait` in an event loop."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            self._holds += 1
            try:
                loop.call_soon_threadsafe(turn, _TURNS)
            except RuntimeError:
                # The loop was closed, and its coroutines with it.
                self._holds -= 1

        def turn(left: int) -> None:
            woken.set()
            if left:
                loop.call_soon(turn, left - 1)
            else:
                self.release()

        waiter = asyncio.current_task() if caller and in_task else None
        entry = _Entry(until, wake, caller=caller, waiter=waiter)
        self._add(entry)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(woken.wait(), longest)
        finally:
            self._remove(entry)

    def hold(self) -> None:
        """Let time run as usual until `release`."""
        with self._condition:
            self._holds += 1

    def release(self) -> None:
        """End one `hold`."""
        with self._condition:
            self._holds -= 1
            self._touch()

    # The thread that jumps.

    def _add(self, entry: _Entry) -> None:
        with self._condition:
            if entry.waiter is not None:
                self._awake.discard(entry.waiter)
            self._count(entry, 1)
            if self._is_running:
                heapq.heappush(self._entries, (entry.until, next(self._numbers), entry))
                self._touch()
            else:
                self._wake(entry)

    def _remove(self, entry: _Entry) -> None:
        with self._condition:
            if not entry.is_over:
                self._end(entry)
                self._touch()

    def _wake(self, entry: _Entry) -> None:
        if not entry.is_over:
            self._end(entry)
            entry.wake()

    def _end(self, entry: _Entry) -> None:
        entry.is_over = True
        self._count(entry, -1)
        if entry.waiter is not None:
            self._awake.add(entry.waiter)

    def _count(self, entry: _Entry, change: int) -> None:
        if entry.caller:
            self._callers += change
            self._unknown += change if entry.waiter is None else 0

    def _touch(self) -> None:
        self._active_at = time.monotonic()
        self._condition.notify_all()

    def _advance(self) -> None:
        with self._condition:
            while self._is_running:
                self._condition.wait(self._step())

    def _step(self) -> float | None:
        """Wake who is due, or jump; return the real seconds until the next step, None if nothing waits."""
        while self._entries and self._entries[0][2].is_over:
            heapq.heappop(self._entries)
        if not self._entries:
            return None
        until, _, entry = self._entries[0]
        left = until - self.monotonic()
        if left <= 0:
            heapq.heappop(self._entries)
            self._wake(entry)
            self._active_at = time.monotonic()
            return 0.0
        if self._holds or not self._callers:
            return left
        self._awake = {waiter for waiter in self._awake if not _has_ended(waiter)}
        if self._awake or self._unknown:
            quiet = self._active_at + _QUIET_SECONDS - time.monotonic()
            if quiet > 0:
                return min(quiet, left)
        self._offset += left
        return 0.0


def _has_ended(waiter: _Waiter) -> bool:
    return not waiter.is_alive() if isinstance(waiter, threading.Thread) else waiter.done()
