"""A server that is healthy but slow, or that accepts a stop and drops it, while a task is ended.

One case is one way to end a task (marked failed, `timeout_seconds`, ...) with one of `LATENCIES`. Each case has a
`LatencyProxy` between its host and the server. The proxy is quick until `begin()`, which a way calls when the run
is running and before it causes the end; a server that is slow as a whole is slow from the first request on.
A busy server carries a request out late, even if its client has disconnected. So the proxy waits first, then
forwards, and does not check whether anyone still reads the reply.

A way is a function from a `LatencyCase` to `Seen`. It

1. lets its host submit a run through ``case.url``, and waits until it is running (``case.client`` is a client of
   the server itself, without the proxy);
2. calls ``case.begin()``, causes the end, and calls ``case.caused()``;
3. calls ``case.watch(run, limit)``, which returns once the run is stopping or has ended, or after ``limit`` seconds,
   the host's own limit;
4. waits until the host has finished, and returns what the host shows and logs.

`try_latencies` (latency_matrix.py) does this for all ways and faults, then runs the environment's reaper on a
server that works again, and judges the results (latency_judge.py).
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Self

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.latency_judge import LatencyResult, Seen, flaw_of, names_page
from tests.faults.loop import Loop
from tests.faults.proxy import Answer, FaultProxy, Forward
from tests.faults.raw_http import endpoint
from tests.rig.server import RealServer

_STOP = "runs/stop"
# Seconds: how often the library repeats a stop that the server dropped, at most.
_REPEATED_EVERY = 5.0
_POLL_SECONDS = 0.25
# Requests may still be in the proxy when the host has ended: two of 10 s, one after the other on one connection.
_DRAIN_SECONDS = 25.0
# An upper bound for a busy machine; the wait returns as soon as the run is running.
_RUNNING_SECONDS = 180.0


@dataclass(frozen=True)
class Latency:
    """One fault: how long each reply takes (seconds, by path), and how many stops are dropped (None: all).

    ``longest`` is the longest delay; ``whole`` begins with the first request instead of with ``begin()``.
    """

    name: str
    delay: Callable[[str], float] = lambda path: 0.0
    drops: int | None = 0
    longest: float = 0.0
    whole: bool = False

    @property
    def seconds_needed(self) -> float:
        """Return how many seconds pass until a stop that is sent at once, and repeated, is carried out."""
        return math.inf if self.drops is None else self.longest + _REPEATED_EVERY * self.drops


def _replies_take(seconds: float) -> Latency:
    return Latency(f"each reply {seconds:g} s", lambda path: seconds, longest=seconds)


LATENCIES = (
    *(_replies_take(seconds) for seconds in (0.5, 1.5, 2.5, 4.0, 10.0)),
    Latency("slow as a whole, 1 to 5 s", lambda path: random.uniform(1.0, 5.0), longest=5.0, whole=True),
    Latency("drops the stop once", drops=1),
    Latency("drops it three times", drops=3),
    Latency("drops every stop", drops=None),
)


class Request(NamedTuple):
    """A request that reached the proxy: its time (``time.monotonic()``) and the end of its path."""

    time: float
    path: str


class LatencyProxy:
    """A proxy in front of ``upstream`` that injects one `Latency` once it has begun.

    ``requests`` records all requests. ``answer_at_once`` maps paths to statuses: such a request is answered with the
    status, without delay, and not carried out. In this way a case causes an error.
    """

    def __init__(self, loop: Loop, upstream: str, latency: Latency) -> None:
        self.latency = latency
        self.requests: list[Request] = []
        self.answer_at_once: dict[str, int] = {}
        self._begun = threading.Event()
        self._left_to_drop = math.inf if latency.drops is None else latency.drops
        self._under_way = 0
        self._proxy = FaultProxy(loop, upstream, between=self._between)
        if latency.whole:
            self.begin()

    @property
    def url(self) -> str:
        return self._proxy.url

    @property
    def is_idle(self) -> bool:
        """Return whether no request is in progress."""
        return self._under_way == 0

    def begin(self) -> None:
        """Switch the fault on."""
        self._begun.set()

    def end(self) -> None:
        """Switch the fault off."""
        self._begun.clear()
        self.answer_at_once.clear()

    def stops_since(self, moment: float) -> list[float]:
        """Return the times of stop requests, in seconds after ``moment``."""
        return [one.time - moment for one in self.requests if one.path == _STOP and one.time >= moment]

    def __enter__(self) -> Self:
        self._proxy.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._proxy.__exit__(kind, error, trace)

    async def _between(self, number: int, target: str, body: bytes, forward: Forward) -> Answer:
        path = endpoint(target)
        self.requests.append(Request(time.monotonic(), path))
        if (status := self.answer_at_once.get(path)) is not None:
            return status, b"{}"
        self._under_way += 1
        try:
            if self._begun.is_set():
                await asyncio.sleep(self.latency.delay(path))
                if path == _STOP and self._left_to_drop > 0:
                    self._left_to_drop -= 1
                    return 200, b"null"
            return await forward(body)
        finally:
            self._under_way -= 1


class NotReached(Exception):
    """A case that did not reach its cause, for example because a busy machine was too slow."""


@dataclass
class LatencyCase:
    """One case while it is tried; ``name`` is unique, so a way can name things after it."""

    way: str
    fault: Latency
    name: str
    proxy: LatencyProxy
    server: LocalServer | RealServer
    client: dstack.Client
    run: dstack.Run | None = None
    limit: float = math.inf
    stopped_after: float | None = None
    caused_at: float = math.inf

    @property
    def url(self) -> str:
        """Return the server's address for the host."""
        return self.proxy.url

    def wait_for_run(self, find: Callable[[], dstack.Run | None]) -> dstack.Run:
        """Return the run that ``find`` finds once it is running."""
        deadline = time.monotonic() + _RUNNING_SECONDS
        while (run := find()) is None or run.refresh().raw_status != "running":
            if time.monotonic() > deadline:
                raise NotReached(f"expected a running run, got {run.raw_status if run else 'no run'}")
            time.sleep(_POLL_SECONDS)
        return run

    def begin(self) -> None:
        """Switch the fault on."""
        self.proxy.begin()

    def caused(self) -> None:
        """Record that the end of the task has just been caused."""
        self.caused_at = time.monotonic()

    def watch(self, run: dstack.Run, limit: float) -> None:
        """Return once the run is stopping or has ended, at the latest ``limit`` seconds after the cause."""
        self.run, self.limit = run, limit
        self._wait_for_stop(lambda: time.monotonic() < self.caused_at + limit)

    def drain(self) -> None:
        """Wait for requests that the host left in progress, which may stop the run late."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        self._wait_for_stop(lambda: not self.proxy.is_idle and time.monotonic() < deadline)

    def is_stopped(self) -> bool:
        """Return whether the run is stopping or has ended."""
        assert self.run is not None, "expected a way that watches its run"
        status = dstack.RunStatus(self.run.refresh().raw_status)
        return status.is_stopping or status.is_finished

    def judged(self, seen: Seen, *, reaped: bool | None, why_not: str = "") -> LatencyResult:
        """Return the result; ``reaped``: whether the reaper stopped the run, None if it was already stopped."""
        assert self.run is not None
        stops = self.proxy.stops_since(self.caused_at)
        # A real server may forget a stop on its own.
        forgotten = reaped is not None and self.stopped_after is not None
        result = LatencyResult(
            way=self.way,
            fault=self.fault.name,
            seconds=round(stops[0], 1) if stops else None,
            stops=len(stops),
            stopped_after=None if self.stopped_after is None else round(self.stopped_after, 1),
            state=self.run.raw_status if reaped is None else "running",
            shown=seen.shown,
            page_named=names_page(seen.log, self.run),
            reaped=reaped,
            in_time=reaped is None and self.stopped_after is not None and self.stopped_after <= self.limit,
            forgotten=forgotten,
        )
        must = self.fault.seconds_needed < self.limit and not forgotten
        return replace(result, flaw=flaw_of(result, seen, self.limit, self.run.name, must=must) + why_not)

    def _wait_for_stop(self, is_time: Callable[[], bool]) -> None:
        while self.stopped_after is None:
            is_last = not is_time()
            if self.is_stopped():
                self.stopped_after = time.monotonic() - self.caused_at
            elif is_last:
                return
            else:
                time.sleep(_POLL_SECONDS)


Way = Callable[[LatencyCase], Seen]
