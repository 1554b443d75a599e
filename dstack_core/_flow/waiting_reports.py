"""Report from time to time what a run that has not started waits for.

The problem: a run may wait for a machine for hours, and a log that shows one status all the time looks as if
something hung. The run itself, which is polled anyway, has most of the answer; the server's events have
since when, and what happened last.

The idea: while a run has not started, a ``Waiting`` about once a minute, from the poll that has just been
made. Events cost a request of their own: one with each report where a run is followed alone, and one for each
step of the run where many are followed together, so a thousand waiting runs add no load by the minute.

Invariants: no report delays or fails a follower. The request for the events is sent once; whatever goes wrong
with it (servers before 0.20 have none), the report lacks what they would add. After a refusal they are not
asked for again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from dstack_core._flow.steps import Flow
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot
from dstack_core._wire.waits import WaitsFor, with_events
from dstack_core.errors import DstackError, TransientServerError
from dstack_core.models.events import Waiting
from dstack_core.models.progress import Progress

# The newest events of one run: more than one step of one job writes.
_EVENTS = 20


class WaitingReports:
    """The reports on one run. ``interval`` (seconds) is the time between two; None reports nothing.

    ``asks_often``: whether the events are asked for with each report, not only after a change.
    """

    __slots__ = ("_asked_for", "_asks_often", "_clock", "_due", "_first_seen", "_interval", "_step")

    def __init__(self, interval: float | None, clock: Callable[[], float], *, asks_often: bool) -> None:
        self._interval = interval
        self._clock = clock
        self._asks_often = asks_often
        self._due: float | None = None
        self._step: str | None = None
        self._first_seen = 0.0
        self._asked_for: str | None = ""

    def report(self, api: Api, run: RunSnapshot, progress: Progress) -> Flow[None]:
        """Report what the run waits for, if it is time to."""
        if self._interval is None:
            return
        if not run.status.is_before_start:
            self._due = None
            return
        now, waits = self._clock(), run.waits
        step = str(run.status) if waits is None else f"{waits.job_id} {waits.status}"
        if step != self._step:
            self._step, self._first_seen = step, now
        if self._due is None:
            self._due = now + self._interval
        if now < self._due or waits is None:
            return
        self._due = now + self._interval
        waits = yield from self._with_events(api, run, waits)
        since = waits.since or datetime.fromtimestamp(self._first_seen, UTC)
        yield Waiting(progress, waits.text, since)

    def _with_events(self, api: Api, run: RunSnapshot, waits: WaitsFor) -> Flow[WaitsFor]:
        if self._asked_for is None or not (self._asks_often or self._asked_for != self._step):
            return waits
        self._asked_for = self._step
        # Sent once: a follower whose server is away has more important requests to repeat.
        request = replace(api.list_events(run.id, limit=_EVENTS, after=None), idempotent=False)
        try:
            events = yield request
        except TransientServerError:
            return waits
        except DstackError:
            self._asked_for = None
            return waits
        return with_events(waits, events)
