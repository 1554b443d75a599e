"""Faults that a test injects into the embedded server."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Fault:
    """One fault; `Faults.add` explains its fields. `answered` is set when its first request has ended."""

    path: str
    times: int | None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    carry_out: bool = False
    drop: Literal["before", "after"] | None = None
    delay: float = 0.0
    answered: threading.Event = field(default_factory=threading.Event)


class Faults:
    """The faults and the latency of a server; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._slow = ("", 0.0, 0.0)
        self._random = random.Random()  # noqa: S311 - a test's delays need no strong randomness

    def add(
        self,
        path: str,
        *,
        times: int | None = 1,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        carry_out: bool = False,
        drop: Literal["before", "after"] | None = None,
        delay: float = 0.0,
    ) -> Fault:
        """Inject a fault into the next requests. Faults are used in the order they were added.

        Args:
            path: A part of the paths that the fault applies to; ``""`` is every path.
            times: How many requests get the fault; None: all of them.
            status: The HTTP status of a reply that replaces the true one.
            headers: The headers of that reply.
            body: The body of that reply: a string is sent as it is, anything else as JSON. Default: an error
                ``{"detail": "injected fault"}``.
            carry_out: Whether the request is carried out, although its reply is replaced.
            drop: Close the connection without a reply: ``"before"`` the request is carried out, or
                ``"after"`` it, which is a lost reply.
            delay: Seconds to wait first. A fault with neither `status` nor `drop` only delays the reply.

        Returns:
            The fault; `pending` counts it until it is used up. `answered` is a `threading.Event` that is set
            when the first request with the fault has ended, even if its client has gone meanwhile.

        Raises:
            ValueError: `times` is less than 1; `status`, `drop` and `delay` are all missing; or both `status`
                and `drop` are given.

        Example:
            >>> server.faults.add("/runs/apply", drop="after")  # a lost reply
        """
        if times is not None and (not isinstance(times, int) or times < 1):
            raise ValueError(f"times: expected 1 or more, or None for all requests, got {times!r}")
        if status is None and drop is None and delay <= 0:
            raise ValueError("fault: expected a status, a drop or a delay, got none of them")
        if status is not None and drop is not None:
            raise ValueError("fault: expected a status or a drop, got both")
        fault = Fault(path, times, status, dict(headers or {}), body, carry_out, drop, delay)
        with self._lock:
            self._faults.append(fault)
        return fault

    def forget_stops(self, times: int | None = 1) -> Fault:
        """Accept the next `times` stop requests (None: all) without acting on them, as a busy server can."""
        return self.add("/runs/stop", times=times, status=200, body="null")

    def slow(self, seconds: float, longest: float | None = None, *, path: str = "") -> None:
        """Delay every reply whose path contains `path` by `seconds`, or by a random time up to `longest`.

        The request is carried out after the delay, even if the client has closed its connection. This delay
        comes before that of other faults. `slow(0)` ends it. Raises ValueError unless
        0 <= seconds <= longest.
        """
        most = seconds if longest is None else longest
        if not 0 <= seconds <= most:
            raise ValueError(f"slow: expected 0 <= seconds <= longest, got {seconds} and {longest}")
        with self._lock:
            self._slow = (path, seconds, most)

    def latency(self, path: str) -> float:
        """Return the seconds to wait before a request is carried out."""
        with self._lock:
            where, least, most = self._slow
        return self._random.uniform(least, most) if most and where in path else 0.0

    def clear(self) -> None:
        """Remove all faults and the latency."""
        with self._lock:
            self._faults.clear()
            self._slow = ("", 0.0, 0.0)

    @property
    def pending(self) -> int:
        """Return how many faults are not used up yet."""
        with self._lock:
            return len(self._faults)

    def take(self, path: str) -> Fault | None:
        """Return the fault for a request and count it as used."""
        with self._lock:
            for fault in self._faults:
                if fault.path in path:
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times <= 0:
                            self._faults.remove(fault)
                    return fault
        return None
