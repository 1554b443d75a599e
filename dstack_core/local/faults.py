"""Faults on demand: what a test asks the embedded server to do wrong."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Fault:
    """Describe one fault; see `Faults.add`."""

    path: str
    times: int | None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    carry_out: bool = False
    drop: Literal["before", "after"] | None = None
    delay: float = 0.0


class Faults:
    """Hold the faults of a server; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

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
        """Misbehave at the next `times` requests (None: all) whose path contains `path`.

        `delay` seconds pass first. `status` is answered instead of the true reply, with `headers` and `body`
        (text as it is, anything else as JSON); the request is carried out only if `carry_out`. `drop` closes
        the connection without a reply: "before" the request is carried out, or "after" it, which is a lost
        reply. A fault with none of these only delays. Faults are used in the order they were added. Raises
        ValueError if nothing is asked for, or both `status` and `drop`.
        """
        if status is None and drop is None and delay <= 0:
            raise ValueError("a fault needs a status, a drop or a delay")
        if status is not None and drop is not None:
            raise ValueError("a fault has either a status or a drop, not both")
        fault = Fault(path, times, status, dict(headers or {}), body, carry_out, drop, delay)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    @property
    def pending(self) -> int:
        """Return how many faults are not used up."""
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
