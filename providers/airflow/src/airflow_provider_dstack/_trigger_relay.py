"""Relay the events of a trigger's run at a limited rate, and save the position for another process.

The problem: all records of a triggerer pass through one process, so a trigger relays at a limited rate. A run
that writes faster is ahead of its trigger by megabytes when it ends, and its task must not wait for them. And
Airflow recreates a trigger from its original arguments, so after a take-over everything that was relayed
since would be relayed again.

The idea: while the relay is held up, a second flow watches for the end of the run. Once the run has ended,
the trigger stops relaying: it fires, and the resumed task relays the rest on its worker, which has no such
limit. A trigger that keeps up never starts the second flow and relays the last lines itself. The position is
saved in an XCom of the task, the one store that triggers can write to: within a second of a line while the
triggerer has time for it. All its triggers share one thread for that, which rests four times as long as a
save takes. So the saves of many tasks cost no more than a fifth of its time; each of them comes later
instead, and then saves what was relayed by its turn.

Invariants: the position that is saved, or handed to the worker, is right behind the last line that was
logged. A position is saved after Airflow has read the lines before it, since it drops what is still in the
pipe when a triggerer is killed: a line may be relayed twice, and none is lost.

Measured (Airflow 3.2, 3.3): a record costs a triggerer up to 0.5 ms of its loop, a megabyte of log about a
second of processor time, a save tens of milliseconds. A worker relays hundreds of thousands of lines a
second.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import delete_xcom, pull_xcom, push_xcom
from airflow_provider_dstack._log_groups import LogGroups
from airflow_provider_dstack._log_relay import position_in, records
from airflow_provider_dstack._run_reports import RunReports

if TYPE_CHECKING:
    from concurrent.futures import Future

    from airflow_provider_dstack._compat import TaskInstanceLike
    from airflow_provider_dstack._log_relay import LogPosition
    from dstack_core import Event, Outcome
    from dstack_core.integration import LogRelay

KEY = "dstack_progress"
# What was relayed in this time is relayed again when a triggerer dies. A line every few seconds is saved
# after each poll. With less, a log that flows costs more saves and repeats hardly less: it comes once a poll.
SECONDS_BETWEEN = 1.0
# The same for a run that floods its log: before such a save, Airflow has to read the flood, which takes up to
# 56 requests. Less time between them takes the triggerer's other tasks more than the fifth that saves may.
SECONDS_BETWEEN_IN_A_FLOOD = 10.0
# After a save the thread that all triggers share rests four times as long as the save took, so that saves
# take a fifth of a triggerer's time at most. With less rest, many saves at once hold up the event loop.
_REST_FACTOR = 4
# What waits to be saved is relayed twice if the triggerer dies, so a few saves after a quiet time do not
# wait: 5 s of rest are a second of saves.
_REST_BURST_SECONDS = 5.0
# A killed triggerer, and a trigger that has ended, lose the records that are still in the pipe to Airflow's
# supervisor. It reads 4 KiB of log for each request that it answers (Airflow 3.2, 3.3), and the pipe holds
# 208 KiB (Linux); a tenth more is for what surrounds the records. With fewer requests, lines are lost.
_READ_BYTES = 4096
_PIPE_BYTES = 230_000
# A triggerer needs about a second of processor time for a megabyte of log. A higher rate lets one run that
# floods its log delay the other tasks of the triggerer.
_BYTES_PER_SECOND = 100_000
# Reading takes about a fiftieth of that; lines beyond the budget are read, too.
_BYTES_READ_PER_SECOND = 5_000_000
# A message costs about as much time as this much log, so that a page of a thousand lets the event loop run.
_BYTES_PER_REPORT = 1000
# 500 kB at once, so that a short log is relayed without a pause. A larger burst delays the other tasks for
# longer.
_BURST_SECONDS = 5.0
# What Airflow's supervisor reads on a busy machine; on a quiet one ten times as much. If this is too high, a
# position is saved before its lines have been read.
_BYTES_PASSED_PER_SECOND = 10_000
# A busy process is behind although the rate limit asks for no pause. A delay of a second is not noticed.
_BEHIND_SECONDS = 1.0
# A follower that has read everything waits for its next poll; the next page comes sooner. Nearer to 0, a slow
# page counts as such a wait; nearer to 1, an early poll does not.
_GAP_SHARE = 0.5
# A run that reports is read twice an interval. With the other share, its trigger would count as behind
# although it keeps up, and would watch for the end with polls of its own.
_REPORTING_GAP_SHARE = 0.5 * _GAP_SHARE


class Pace:
    """A rate limit with bursts: after a quiet time, the first ``burst_seconds`` of waiting are waived."""

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
        """Return the seconds that were spent and have not passed since."""
        return max(0.0, self._paid_until - self._clock() + self._burst_seconds)


class TriggerRelay:
    """The relay of one run's events at a limited rate.

    ``notify`` gets each event, and each part of one, that was logged. ``wait_for_end`` waits for the run's
    end and returns its outcome, None if it cannot be known. ``outcome`` is set once the run has ended before
    its log was relayed; it lacks what the run has reported.
    """

    def __init__(
        self,
        relay: LogRelay,
        position: LogPosition,
        checkpoints: Checkpoints,
        wait_for_end: Callable[[], Coroutine[Any, Any, Outcome | None]],
        *,
        reports: RunReports | None = None,
        notify: Callable[[Event], None] | None = None,
        groups: LogGroups | None = None,
        poll_interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._relay = relay
        self.reports = RunReports() if reports is None else reports
        self._groups = LogGroups() if groups is None else groups
        self._log: Any = None
        self.outcome: Outcome | None = None
        self._notify = notify
        self._position = position
        self._checkpoints = checkpoints
        self._wait_for_end = wait_for_end
        self._clock = clock
        self._poll_interval = poll_interval
        self._gap_seconds = _GAP_SHARE * poll_interval
        self._rate = Pace(_BURST_SECONDS, clock)
        self._in_pipe = Pace(0.0, clock)
        self._later: asyncio.TimerHandle | None = None
        self._gap_timer: asyncio.TimerHandle | None = None
        self._end: asyncio.Task[Outcome | None] | None = None
        # The first event follows a wait: where thousands of triggers start together, a long one.
        self._relayed_at = self._behind_since = -math.inf
        self._is_writing = False

    @property
    def tail(self) -> list[str]:
        """The last lines that were relayed."""
        return self._relay.tail

    async def write(self, event: Event, log: Any) -> bool:
        """Log an event; return False if the run has ended and the rest is better left to the worker."""
        from dstack_core import LogLines, Reported

        if isinstance(event, Reported):
            self._gap_seconds = _REPORTING_GAP_SHARE * self._poll_interval
        self._note_gap()
        if isinstance(event, LogLines):
            for number, (part, characters) in enumerate(self._position.new_parts(event)):
                if number:
                    self._offer()
                await self._write(part, log)
                self._position.relayed(part, event)
                await self._pace(characters / _BYTES_READ_PER_SECOND)
                if self.outcome is not None:
                    return False
        else:
            await self._write(event, log)
        self._relayed_at = self._clock()
        if self._end is not None:
            # A log that has been relayed may stay silent for hours, so no next event would note the gap.
            self._gap_timer = asyncio.get_running_loop().call_later(self._gap_seconds, self._note_gap)
        self._position.passed(event)
        self._offer()
        if isinstance(event, Reported):
            await self._pace(_BYTES_PER_REPORT / _BYTES_READ_PER_SECOND)
            return self.outcome is None
        return True

    def save_last(self) -> asyncio.Future[None] | None:
        """Start saving the last position; return the future of that, None if it is saved already."""
        last = self._checkpoints.last(self.state())
        return None if last is None else asyncio.wrap_future(last)

    def state(self) -> dict[str, Any]:
        """Return the state with which another process continues, JSON-plain."""
        position = self._position.to_dict()
        position["progress"] = self.reports.without_secrets(position["progress"])
        return {**position, **self._relay.state(), "reported": self.reports.state()}

    def recent_bytes(self) -> float:
        """Return how many bytes of what was logged Airflow may not have read yet."""
        return self._in_pipe.seconds_spent() * _BYTES_PASSED_PER_SECOND

    async def close(self) -> None:
        """Close a group of the log; drop what was not saved yet, but for what ``save_last`` began to save."""
        for level, text in self._groups.close():
            self._log.log(level, text)
        for timer in (self._later, self._gap_timer):
            if timer is not None:
                timer.cancel()
        self._checkpoints.close()
        if self._end is not None:
            self._end.cancel()
            await asyncio.wait((self._end,))
            if not self._end.cancelled():
                self._end.exception()

    async def _write(self, event: Event, log: Any) -> None:
        # Meanwhile the relay has counted a part of the event that the position has not, so it must not be
        # saved.
        self._is_writing = True
        self._log = log
        for level, text in records(self._relay, event, self.reports, self._groups):
            log.log(level, text)
            self._in_pipe.wait_after(len(text) / _BYTES_PASSED_PER_SECOND)
            await self._pace(len(text) / _BYTES_PER_SECOND)
        if self._notify is not None:
            self._notify(event)
        self._is_writing = False

    def _offer(self) -> None:
        """Save the position, now or as soon as that is allowed: there may be no further line to start it."""
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
        if self._gap_timer is not None:
            self._gap_timer.cancel()
            self._gap_timer = None
        now = self._clock()
        if now - self._relayed_at < self._gap_seconds:
            return
        self._behind_since = now
        if self._end is not None and not self._end.done():
            self._end.cancel()
            self._end = None


class Checkpoints:
    """The saves of a relay's state: only a new one, and a second after the last save at the earliest.

    ``start_save`` starts a save and returns its future; it gets what returns the state to save (None:
    nothing), which is called once, in any thread. Until then a newer state replaces the one that waits.
    ``first`` is the state that is saved already. ``position`` returns what must differ for a new state: by
    default what was read of the log, as a status that is logged twice does no harm. ``is_flood`` returns
    whether Airflow has yet to read much of the log; then ten seconds pass between two saves. What happens
    after the last save is relayed again when the triggerer dies.
    """

    def __init__(
        self,
        start_save: Callable[[Callable[[], dict[str, Any] | None]], Future[None] | asyncio.Future[None]],
        first: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
        position: Callable[[Mapping[str, Any]], Any] = position_in,
        is_flood: Callable[[], bool] = lambda: False,
    ) -> None:
        self._start_save = start_save
        self._is_flood = is_flood
        self._clock = clock
        self._position = position
        self._saved = position(first)
        self._saving: Future[None] | asyncio.Future[None] | None = None
        self._waiting: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._started = -math.inf

    def offer(self, state: Callable[[], dict[str, Any]]) -> bool:
        """Save what ``state`` returns if it is time to and if it is new; does not wait.

        Returns False if another offer is needed later.
        """
        is_saving = self._saving is not None and not self._saving.done()
        if is_saving and self._waiting is not None:
            return self._replace(state())
        pause = SECONDS_BETWEEN_IN_A_FLOOD if self._is_flood() else SECONDS_BETWEEN
        if self._clock() < self._started + pause or is_saving:
            return False
        now = state()
        if self._position(now) != self._saved:
            self._start(now)
        return True

    def last(self, state: dict[str, Any]) -> Future[None] | asyncio.Future[None] | None:
        """Save ``state`` at once if it is new, and close; return the future of what is saved last, if any."""
        if self._position(state) != self._saved:
            self.close()
            self._start(state)
        last, self._saving = self._saving, None
        return last

    def close(self) -> None:
        """Give up a save that has not begun."""
        if self._saving is not None:
            self._saving.cancel()

    def _start(self, state: dict[str, Any]) -> None:
        self._waiting, self._saved = state, self._position(state)
        self._started = self._clock()
        self._saving = self._start_save(self._take)

    def _replace(self, state: dict[str, Any]) -> bool:
        """Let a save that has not begun save this state; return False if none waits."""
        with self._lock:
            if self._waiting is None or self._saving is None or self._saving.done():
                return False
            self._waiting, self._saved = state, self._position(state)
            return True

    def _take(self) -> dict[str, Any] | None:
        """Return the newest state, which from now on is being saved; None if another save has taken it."""
        with self._lock:
            state, self._waiting = self._waiting, None
        return state


_REST = Pace(burst_seconds=_REST_BURST_SECONDS)


def save(ti: TaskInstanceLike, marker: str, state: Mapping[str, Any]) -> None:
    """Save ``state`` (JSON-plain) for the try that ``marker`` names. Blocks; raises what Airflow raises."""
    push_xcom(ti, KEY, {"marker": marker, **state})


def log_requests(recent_bytes: float) -> int:
    """Return the number of requests after which Airflow has read what was logged before them."""
    return int(min(recent_bytes, _PIPE_BYTES) / _READ_BYTES)


def save_and_rest(
    ti: TaskInstanceLike,
    marker: str,
    state: Mapping[str, Any],
    recent_bytes: float = 0.0,
    push: Callable[[], None] = lambda: None,
) -> None:
    """Do ``push`` and ``save``, and wait four times as long; a few saves after a quiet time do not wait.

    In a thread that all triggers share this takes the triggerer a fifth of its time at most, however many
    tasks are deferred. After ``recent_bytes`` of log it first lets Airflow read them: a position that is
    saved before its lines would lose them.
    """
    for _ in range(log_requests(recent_bytes)):
        pull_xcom(ti, KEY)
    started = time.monotonic()
    try:
        # Before the position: what is behind it is not received again after a takeover.
        push()
        save(ti, marker, state)
    finally:
        time.sleep(_REST.wait_after(_REST_FACTOR * (time.monotonic() - started)))


def load(ti: TaskInstanceLike, marker: str) -> dict[str, Any] | None:
    """Return what the same try saved last, or None. Blocks; raises what Airflow raises."""
    found = pull_xcom(ti, KEY)
    if not isinstance(found, Mapping) or found.get("marker") != marker:
        # A trigger of an earlier try may write after this one began: all tries share the XCom.
        return None
    return {name: value for name, value in found.items() if name != "marker"}


def forget(ti: TaskInstanceLike) -> None:
    """Remove what was saved, once no process needs it. Blocks; raises what Airflow raises."""
    delete_xcom(ti, KEY)
