"""Answer the polls of many runs of one project from pages of its active runs.

The problem: thousands of followers in one process each want a poll every few seconds. A request each is too
many for the server, and waking each of them is too much work for one event loop.

The idea: a flow that polls, or waits for news, leaves a ``PendingPoll`` here. One task answers all that are
due together, a *round*: it reads pages of 100 active runs, newest first, as long as that takes fewer requests
than asking for each run. A waiting follower costs no timer and no task of its own: the rounds know themselves
when the next one is due. If a page shows no news, the pending poll is moved on by an interval, in place, and
the follower is not woken.

When polls are due, and how they are spread to keep the loop responsive, is in ``pending_polls``.

Invariants: an answer comes from a request that was sent after the poll was due. Every poll is answered once:
with a reply, a fault, or None (poll for this run alone). A wait never lasts longer than its ``due``, unless
the server is late. Nothing keeps running once no flow waits.

Measured (``benchmarks/watching.py``): a waiting follower takes about 11 KiB with a client of its own, 18 KiB
as an Airflow trigger. One read of a silent log costs more than the twelve polls of a minute. Counting all
that still wait before each page took 13 % of a round of 2,000 runs, and grew with the square of their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import Context
from itertools import islice
from typing import Any

from dstack_core import clock
from dstack_core._flow.steps import Wait
from dstack_core._shared.pending_polls import EARLY_SHARE, PendingPoll, polls_until_turn, seconds_to_poll
from dstack_core._wire.http_messages import Reply, Request
from dstack_core._wire.lookups import ActivePage, Lookup, Sighting, active_page
from dstack_core.errors import DstackError, TransientServerError

# How long a silent log may stay unread where many runs are watched; a run that is followed alone has 15 s. A
# minute leaves 64 log reads an hour for an idle run (361 with 15 s); more delays the first line after a
# silence.
LONGEST_LOG_PAUSE = 60.0
# A round waits this long for plain polls, and again while more arrive: those of many flows that wake together
# arrive within about this time on a busy machine. A shorter wait splits rounds, a longer one delays answers.
GATHER_SECONDS = 0.1
# In units of GATHER_SECONDS: polls that keep coming must not put a round off for more than about a second.
# Fewer units split the rounds of flows that wake together on a busy machine.
_LONGEST_GATHERING = 12
# So many runs that wait make a crowd, whose logs are read less often while they flow. With a lower
# number a few runs that a person watches are delayed, with a higher one the requests of more runs add up.
CROWD = 50
# A page costs a server about as much as this many single polls, so it must save more. A lower number reads
# pages for the sake of a few runs, a higher one polls many runs alone.
PAGE_WORTH = 4
# How long a run counts as watched. If fewer than PAGE_WORTH runs are, rounds wait for no others. If this were
# shorter than common poll intervals, many runs would be treated as a few.
_REMEMBERED_SECONDS = 300.0
# Reading a page takes up to 20 ms, in which nothing else runs; so after every 25 runs others get a turn.
# Fewer turns block the event loop for longer, more of them slow a round down.
_RUNS_A_TURN = 25
# A woken flow mostly reads a log. So after every ten there is a pause of 5 ms for each, about what a log read
# takes of a core on a slow machine, so that other work gets its turn; all pauses of a round take at most
# that share of the interval. Without them the event loop was late by the whole burst.
_HANDFUL = 10
_PAUSE_SECONDS = 0.005
_PAUSES_SHARE = 0.4

_Send = Callable[[Request], Awaitable[Reply]]
_Pending = dict[Lookup, list[PendingPoll]]


class BatchedPolls:
    """The pending polls of one project's runs, answered together in rounds.

    A poll that comes while a round is under way waits for the next round.
    """

    def __init__(self, send: _Send, server_url: str, project: str) -> None:
        self._send = send
        self._server_url = server_url
        self._project = project
        self._pending: _Pending = {}
        # How many runs waited before the last round: it wakes many of them at once.
        self._waited = 0
        self._polled = 0
        self._last_polled: dict[Lookup, float] = {}
        self._wake_at = 0.0
        self._woken = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None

    def poll(self, lookup: Lookup) -> PendingPoll:
        """Poll now; the answer raises the fault of its round."""
        self._polled += 1
        loop = asyncio.get_running_loop()
        return self._add(PendingPoll(lookup, loop.create_future(), clock.monotonic()))

    def wait(self, lookup: Lookup, wait: Wait) -> PendingPoll:
        """Poll until there is news or the wait is due."""
        if max(self._waited, len(self._pending)) >= CROWD:
            wait = wait.in_crowd()
        interval, wall_clock = wait.interval, clock.epoch()
        first = seconds_to_poll(interval, lookup.value, wall_clock)
        polls = polls_until_turn(wait.polls, interval, lookup.value, wall_clock)
        return self._wait(lookup, wait, min(first, wait.due + EARLY_SHARE * interval), polls)

    def close(self) -> None:
        """Stop working; polls that are still pending are answered with None."""
        if self._rounds is not None:
            self._rounds.cancel()

    def _wait(self, lookup: Lookup, wait: Wait, first: float, polls: int) -> PendingPoll:
        loop = asyncio.get_running_loop()
        return self._add(PendingPoll(lookup, loop.create_future(), clock.monotonic() + first, wait, polls))

    def _add(self, poll: PendingPoll) -> PendingPoll:
        self._pending.setdefault(poll.lookup, []).append(poll)
        self._remember(poll.lookup, clock.monotonic())
        if self._rounds is None:
            # An empty context: the rounds serve all flows, so their log lines must not carry the context of
            # the flow that came first.
            self._rounds = asyncio.get_running_loop().create_task(self._work(), context=Context())
        elif poll.latest < self._wake_at:
            self._woken.set()
        return poll

    async def _work(self) -> None:
        ready: _Pending = {}
        try:
            while self._pending:
                await self._until_due()
                await self._gather()
                self._waited = len(self._pending)
                ready = self._take_ready()
                await self._round(ready)
                # What no page answered: finished and deleted runs, and the few that are not worth a page.
                _answer(_all(ready), None)
        finally:
            # If this fails or the client is closed, each flow polls for itself instead of waiting forever.
            self._rounds = None
            for left in (ready, self._pending):
                _answer(_all(left), None)
            self._pending = {}

    async def _until_due(self) -> None:
        # A few runs are polled when they are due; of a crowd, a round waits for those spread behind the
        # first.
        crowded = len(self._last_polled) >= PAGE_WORTH
        while (
            wait := min(each.latest if crowded else each.due for each in _all(self._pending))
            - clock.monotonic()
        ) > 0:
            # A new poll that is due earlier sets the event (``_add``), and the wait is computed again.
            self._woken.clear()
            self._wake_at = clock.monotonic() + wait
            await clock.await_event(self._woken, wait)
        self._wake_at = 0.0

    def _remember(self, lookup: Lookup, now: float) -> None:
        """Keep the last few different runs that were polled, the newest last."""
        last = self._last_polled
        last.pop(lookup, None)
        last[lookup] = now
        oldest = next(iter(last))
        while len(last) > PAGE_WORTH or last[oldest] < now - _REMEMBERED_SECONDS:
            del last[oldest]
            oldest = next(iter(last))

    async def _gather(self) -> None:
        if len(self._last_polled) < PAGE_WORTH:
            return
        for _ in range(_LONGEST_GATHERING):
            before = self._polled
            await clock.asleep(GATHER_SECONDS, in_task=False)
            if self._polled == before:
                return

    def _take_ready(self) -> _Pending:
        # The usual single poll of a run moves over as the list it is in: this goes over thousands.
        now = clock.monotonic()
        ready: _Pending = {}
        for lookup, polls in self._pending.items():
            if len(polls) == 1:
                if polls[0].due <= now:
                    ready[lookup] = polls
            elif all(poll.due <= now for poll in polls):
                ready[lookup] = polls
            elif taken := [poll for poll in polls if poll.due <= now]:
                ready[lookup] = taken
                polls[:] = [poll for poll in polls if poll not in taken]
        for lookup in [one for one, polls in ready.items() if polls is self._pending[one]]:
            del self._pending[lookup]
        return ready

    async def _round(self, ready: _Pending) -> None:
        """Answer from pages as long as they are worth it; the runs left over are polled alone."""
        position: Mapping[str, Any] | None = None
        # The runs may be on the last pages: half of what the polls would cost alone may be spent in vain.
        worth = len(ready) // 2
        pause = _pause(ready)
        # Few rounds have polls by name: the first poll of a run whose id is not known yet. A name is only in
        # the run's JSON, so all of it would have to be read.
        by_name = any(lookup.key == "run_name" for lookup in ready)
        # Count only as many as matter: there may be thousands, and a hundred pages.
        while sum(1 for _ in islice(_open(ready), PAGE_WORTH)) >= PAGE_WORTH:
            call = active_page(self._server_url, self._project, position)
            try:
                reply = await self._send(call.request)
            except TransientServerError as error:
                _fail(_all(ready), error)
                return
            try:
                page = call.parse(reply)
                worth += await self._hand_out(page, ready, pause, by_name=by_name) - PAGE_WORTH
            except TransientServerError:
                # Each flow reads this reply as its own, so that the error names its run.
                _answer(_all(ready), reply)
                return
            except DstackError:
                # The reply to a poll of one run explains more, and its error names that run.
                return
            position = page.position
            if position is None or worth < 0:
                return

    async def _hand_out(self, page: ActivePage, ready: _Pending, pause: float, *, by_name: bool) -> int:
        """Answer the polls of the page's runs, also those by name; return how many runs that was."""
        found = answered = 0
        for number, sighting in enumerate(page, start=1):
            for lookup in (sighting.by_id, sighting.by_name) if by_name else (sighting.by_id,):
                # Newest first: of two runs of one name, the first has the name now.
                polls = ready.pop(lookup, None)
                if polls is not None:
                    found += 1
                    answered += self._show(polls, sighting)
            if answered >= _HANDFUL or number % _RUNS_A_TURN == 0:
                await asyncio.sleep(answered * pause)
                answered = 0
        await asyncio.sleep(answered * pause)
        return found

    def _show(self, polls: list[PendingPoll], sighting: Sighting) -> int:
        """Answer the polls that a sighting ends; return how many."""
        now = clock.monotonic()
        ended = [poll for poll in polls if not poll.continues(sighting, now)]
        if ended:
            _answer(ended, sighting.reply)
            polls[:] = [poll for poll in polls if poll not in ended]
        if polls:
            # Mostly the same list goes back, under the same key: thousands of new ones would be garbage.
            lookup = polls[0].lookup
            if self._pending.setdefault(lookup, polls) is not polls:
                self._pending[lookup] += polls
        return len(ended)


def _pause(ready: _Pending) -> float:
    """Return the seconds to pause for each flow that is woken; 0 for plain polls."""
    intervals = [poll.wait.interval for poll in _all(ready) if poll.wait and poll.is_last]
    return min(_PAUSE_SECONDS, _PAUSES_SHARE * min(intervals) / len(intervals)) if intervals else 0.0


def _all(pending: _Pending) -> Iterable[PendingPoll]:
    return (poll for polls in pending.values() for poll in polls)


def _open(pending: _Pending) -> Iterable[Lookup]:
    """The runs that a flow still waits for; a cancelled one has its answer already."""
    return (lookup for lookup, polls in pending.items() if any(not poll.answer.done() for poll in polls))


def _answer(polls: Iterable[PendingPoll], reply: Reply | None) -> None:
    for poll in polls:
        if not poll.answer.done():
            poll.answer.set_result(reply)


def _fail(polls: Iterable[PendingPoll], error: TransientServerError) -> None:
    for poll in polls:
        if not poll.answer.done():
            # Each gets its own exception: one that is raised in several places collects all their frames.
            poll.answer.set_exception(TransientServerError(error.message, retry_after=error.retry_after))
