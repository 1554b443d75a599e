"""The conditions that a task must meet if it was ended while the server was slow or dropped the stop.

A case holds if the run is stopping or has ended within the host's own limit. If the limit makes that impossible
(10 s replies against 5 s; a server that drops every stop), the host's log must name the run's page, and the
reaper's next pass must stop the run once the server works again. And what the host shows must agree with the
server: the task's state, and the last record of its log about the run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import dstack_core as dstack


class Said(NamedTuple):
    """A record of the host's log: its level (as in `logging`) and its text."""

    level: int
    text: str


@dataclass(frozen=True)
class Seen:
    """What the host shows of a case.

    ``shown`` is the state that the host shows, ``expected`` are the right states. ``log`` has the records of the log,
    oldest first, possibly with records from before the cause.
    """

    shown: str
    expected: Sequence[str]
    log: Sequence[Said]


@dataclass(frozen=True)
class LatencyResult:
    """The result of a case; ``flaw`` is empty if everything held.

    ``seconds`` is the time from the cause to the first stop request, ``stopped_after`` the time from the cause until
    the server showed the run as stopping or ended; None: never. ``state`` is the run's raw status when the host had
    finished. ``in_time``: the run was stopped within the host's limit, and stayed so. ``forgotten``: it did not stay
    so, because the server forgot the stop on its own. ``reaped``: whether the reaper's pass stopped a run that was
    left over; None if none was.
    """

    way: str
    fault: str
    seconds: float | None = None
    stops: int = 0
    stopped_after: float | None = None
    state: str = "?"
    shown: str = "?"
    page_named: bool = False
    reaped: bool | None = None
    in_time: bool = False
    forgotten: bool = False
    flaw: str = ""

    @property
    def how(self) -> str:
        """Return how the case holds: in time, late or by the reaper (the page was named), or "not"."""
        if self.flaw:
            return "not"
        return "reaper" if self.reaped else "in time" if self.in_time else "late"


def names_page(log: Sequence[Said], run: dstack.Run) -> bool:
    """Return whether a warning or an error of the log has the address of the run's page."""
    # The host knows the server by another address, that of the proxy.
    page = urlsplit(run.url).path
    return any(page in one.text for one in log if one.level >= logging.WARNING)


def flaw_of(result: LatencyResult, seen: Seen, limit: float, run_name: str, *, must: bool) -> str:
    """Return what is wrong, or an empty string; ``must``: the limit leaves enough time for the stop."""
    flaws = []
    if seen.shown not in seen.expected:
        flaws.append(f"expected the host to show {' or '.join(seen.expected)}, got {seen.shown}")
    if not result.in_time:
        how = (
            "still " + result.state
            if result.stopped_after is None
            else f"stopped after {result.stopped_after} s"
        )
        if must:
            flaws.append(f"expected a stopped run within {limit:g} s, got one {how}")
        if not result.page_named:
            flaws.append(f"the run is {how}, and no warning names its page")
    if result.reaped is not None:
        last = _last_record(seen.log, run_name)
        if last is not None and last.level < logging.WARNING:
            flaws.append(f"the run is running, and the log's last record about it is {last.text!r}")
        if not result.reaped:
            flaws.append("the reaper did not stop the run")
    return "; ".join(flaws)


def _last_record(log: Sequence[Said], run_name: str) -> Said | None:
    return next((one for one in reversed(log) if run_name in one.text), None)
