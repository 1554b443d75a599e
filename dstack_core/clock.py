"""The clock of the client, the hosts' adapters and the embedded server: the one place that waits for time.

The problem: a test of a retry that lasts an hour must not last an hour, and the time limits of the code under
test must keep their meaning.

The idea: all code that waits, or compares times, asks this module. By default it is the clock of the machine.
`install` replaces it for the time of a test, usually by a `dstack_core.local.VirtualTime`; a test of another
engine can install one of its own.

Invariants: nothing is replaced by an import, and `install` restores what was there before. The limits of a
single request (connecting, reading a reply) are always seconds of the machine's clock: a reply really takes
that time. `asyncio` is not imported here: async callers have it already.
"""

from __future__ import annotations

import contextlib
import sys
import time as _machine
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio


class Clock(Protocol):
    """A replacement of the machine's clock; its methods are called from any thread."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    def epoch(self) -> float:
        """Return the seconds since 1970."""

    def wait(self, until: float, longest: float | None = None) -> None:
        """Block until `monotonic` is `until`, or for at most `longest` seconds of the machine's clock."""

    async def await_(
        self, until: float, longest: float | None = None, *, caller: bool = True, in_task: bool = True
    ) -> None:
        """Wait like `wait`, in an event loop; with ``caller=False`` the clock need not hurry.

        ``in_task`` is False if the task that waits here is not the one that continues afterwards.
        """

    def hold(self) -> None:
        """Note that work begins: time passes as it does for the machine until `release`."""

    def release(self) -> None:
        """Note that the work of one `hold` is done, or waits for time itself."""


class _Installed:
    clock: Clock | None = None


@contextlib.contextmanager
def install(clock: Clock) -> Iterator[None]:
    """Use a clock in this process until the ``with`` block ends, then the one from before."""
    before, _Installed.clock = _Installed.clock, clock
    try:
        yield
    finally:
        _Installed.clock = before


def is_virtual() -> bool:
    """Return whether a clock is installed."""
    return _Installed.clock is not None


def monotonic() -> float:
    """Return seconds that never go back, like ``time.monotonic()``."""
    clock = _Installed.clock
    return _machine.monotonic() if clock is None else clock.monotonic()


def epoch() -> float:
    """Return the seconds since 1970, like ``time.time()``."""
    clock = _Installed.clock
    return _machine.time() if clock is None else clock.epoch()


def now() -> datetime:
    """Return the current time in UTC."""
    clock = _Installed.clock
    return datetime.now(UTC) if clock is None else datetime.fromtimestamp(clock.epoch(), UTC)


def sleep(seconds: float) -> None:
    """Wait, like ``time.sleep()``."""
    clock = _Installed.clock
    if clock is None:
        _machine.sleep(seconds)
    else:
        clock.wait(clock.monotonic() + seconds)


async def asleep(seconds: float, *, caller: bool = True, in_task: bool = True) -> None:
    """Wait, like ``asyncio.sleep()``.

    Args:
        seconds: How long.
        caller: Whether a client or a task waits. A server that lets time pass sets False: its own timers are
            not a reason for virtual time to jump.
        in_task: Whether this task continues afterwards; False if it lets others continue.
    """
    clock = _Installed.clock
    if clock is None:
        await sys.modules["asyncio"].sleep(seconds)
    else:
        await clock.await_(clock.monotonic() + seconds, caller=caller, in_task=in_task)


def sleep_in_slices(seconds: float, longest: float, after: Callable[[], object]) -> None:
    """Wait, and call a function at least every `longest` seconds of the machine's clock, and at the end.

    Args:
        seconds: How long; 0 calls the function once.
        longest: The longest time between two calls, in seconds.
        after: Called after each slice; the wait ends if it returns something true, or raises.
    """
    until = monotonic() + seconds
    while True:
        clock = _Installed.clock
        if clock is None:
            _machine.sleep(max(0.0, min(longest, until - monotonic())))
        else:
            clock.wait(until, longest)
        if after() or monotonic() >= until:
            return


async def asleep_in_slices(seconds: float, longest: float, after: Callable[[], Awaitable[object]]) -> None:
    """Wait and call a coroutine function in between: the twin of `sleep_in_slices`."""
    until = monotonic() + seconds
    while True:
        clock = _Installed.clock
        if clock is None:
            await sys.modules["asyncio"].sleep(max(0.0, min(longest, until - monotonic())))
        else:
            await clock.await_(until, longest)
        if await after() or monotonic() >= until:
            return


async def await_event(event: asyncio.Event, seconds: float | None, *, caller: bool = True) -> bool:
    """Wait for an event for at most some seconds (None: without a limit); return whether it was set.

    Args:
        event: The event.
        seconds: The limit.
        caller: As for `asleep`.
    """
    aio = sys.modules["asyncio"]
    if seconds is None:
        await event.wait()
        return True
    if _Installed.clock is None:
        try:
            await aio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return event.is_set()
        return True
    if event.is_set():
        return True
    until = _Installed.clock.monotonic() + seconds
    passing = _Installed.clock.await_(until, caller=caller, in_task=False)
    tasks = {aio.ensure_future(event.wait()), aio.ensure_future(passing)}
    try:
        await aio.wait(tasks, return_when=aio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await aio.gather(*tasks, return_exceptions=True)
    return event.is_set()


class Work:
    """Work that takes the time that it takes on this machine: virtual time passes as usual meanwhile.

    `pause` and `resume` enclose a part in which the work itself waits for time. Without an installed clock
    this does nothing.
    """

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._pauses = 0
        self._is_last = False

    def __enter__(self) -> Work:
        self._clock = _Installed.clock
        if self._clock is not None:
            self._clock.hold()
        return self

    def __exit__(self, *_: object) -> None:
        clock, self._clock = self._clock, None
        if clock is not None and (self._is_last or not self._pauses):
            clock.release()

    def pause(self) -> None:
        """Note that the work waits for time from now on."""
        self._pauses += 1
        if self._pauses == 1 and not self._is_last and self._clock is not None:
            self._clock.release()

    def resume(self) -> None:
        """Note that it continues; as many calls as of `pause`."""
        self._pauses -= 1
        if not self._pauses and not self._is_last and self._clock is not None:
            self._clock.hold()

    def finish(self) -> None:
        """Note that what follows is work, whatever part of it still waits."""
        if self._pauses and not self._is_last and self._clock is not None:
            self._clock.hold()
        self._is_last = True
