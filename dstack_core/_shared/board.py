"""Answer looks at many runs of one project from pages of its active runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any

from dstack_core._flow.steps import Rest
from dstack_core._wire.lookups import ActivePage, Lookup, Sighting, active_page
from dstack_core._wire.plain import Reply, Request
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import DstackError, TransientServerError

# How long a round waits for looks, again as long as more come; those of many flows are spread a bit.
GATHER_SECONDS = 0.1
_LONGEST_GATHERING = 12
# A page costs a server about as much as this many single looks, so it must save more.
PAGE_WORTH = 4
# So long a run counts as watched. Where fewer than PAGE_WORTH are, rounds wait for no others.
_REMEMBERED_SECONDS = 300.0
# Rests that end within this time are looked after in one round: a second, or that part of a short interval.
_TOGETHER_SECONDS = 1.0
_TOGETHER_SHARE = 0.2
# Whoever is woken has something to do, mostly to read a log. So not all are woken at once: after a handful
# there is a pause of so many seconds for each, in all at most that share of the interval.
_HANDFUL = 10
_PAUSE_SECONDS = 0.005
_PAUSES_SHARE = 0.4

_Send = Callable[[Request], Awaitable[Reply]]
_Waiting = dict[Lookup, list["Asked"]]


class Asked:
    """Be one look, or one rest that takes several: ``rounds`` counts them.

    ``answer`` becomes the reply, or None where the run must be asked for alone.
    """

    __slots__ = ("answer", "due", "lookup", "rounds", "step")

    def __init__(
        self, lookup: Lookup, answer: asyncio.Future[Reply | None], due: float, step: Rest | None
    ) -> None:
        self.lookup = lookup
        self.answer = answer
        self.due = due
        self.step = step
        self.rounds = 1

    @property
    def is_last(self) -> bool:
        """Tell whether the next look ends it, whatever that shows."""
        return self.step is None or self.rounds >= self.step.rounds

    @property
    def latest(self) -> float:
        """Return when to look at the latest."""
        interval = self.step.interval if self.step else 0.0
        return self.due + min(_TOGETHER_SECONDS, _TOGETHER_SHARE * interval)

    def goes_on(self, run: RunSnapshot | None, now: float) -> bool:
        """Tell whether ``run`` shows nothing that ends this rest; then it rests for another interval."""
        if self.step is None or self.is_last or self.answer.done() or run is None or self.step.is_news(run):
            return False
        self.rounds += 1
        # What was missed while the server was slow is not made up for.
        self.due += self.step.interval * (1 + max(0.0, now - self.due) // self.step.interval)
        return True


class Board:
    """Gather the looks at one project's runs and answer each round of them together.

    A look is answered from requests that were sent after it was asked for: one that comes while a round
    is under way waits for the next.
    """

    def __init__(self, send: _Send, server_url: str, project: str) -> None:
        self._send = send
        self._server_url = server_url
        self._project = project
        self._waiting: _Waiting = {}
        self._asked = 0
        self._last_asked: dict[Lookup, float] = {}
        self._wake_at = 0.0
        self._woken = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None

    def look(self, lookup: Lookup) -> Asked:
        """Ask now; the answer raises what a round meets."""
        self._asked += 1
        return self._ask(lookup, asyncio.get_running_loop().time(), None)

    def rest(self, lookup: Lookup, step: Rest) -> Asked:
        """Ask in ``step.seconds``, and again as long as that shows nothing new."""
        return self._ask(lookup, asyncio.get_running_loop().time() + step.seconds, step)

    def close(self) -> None:
        """Stop working; who still waits asks alone."""
        if self._rounds is not None:
            self._rounds.cancel()

    def _ask(self, lookup: Lookup, due: float, step: Rest | None) -> Asked:
        loop = asyncio.get_running_loop()
        asked = Asked(lookup, loop.create_future(), due, step)
        self._waiting.setdefault(lookup, []).append(asked)
        self._remember(lookup, loop.time())
        if self._rounds is None:
            # An empty context: the work is for all, so nothing of it belongs into the log of the first.
            self._rounds = loop.create_task(self._work(), context=Context())
        elif asked.latest < self._wake_at:
            self._woken.set()
        return asked

    async def _work(self) -> None:
        ready: _Waiting = {}
        try:
            while self._waiting:
                await self._until_due()
                await self._gather()
                ready = self._take_ready()
                await self._round(ready)
                _answer(_all(ready), None)
        finally:
            self._rounds = None
            for left in (ready, self._waiting):
                _answer(_all(left), None)
            self._waiting = {}

    async def _until_due(self) -> None:
        loop = asyncio.get_running_loop()
        crowded = len(self._last_asked) >= PAGE_WORTH
        while (
            wait := min(each.latest if crowded else each.due for each in _all(self._waiting)) - loop.time()
        ) > 0:
            self._woken.clear()
            self._wake_at = loop.time() + wait
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._woken.wait()
        self._wake_at = 0.0

    def _remember(self, lookup: Lookup, now: float) -> None:
        """Keep the last few different ones that were asked about, the newest last."""
        last = self._last_asked
        last.pop(lookup, None)
        last[lookup] = now
        oldest = next(iter(last))
        while len(last) > PAGE_WORTH or last[oldest] < now - _REMEMBERED_SECONDS:
            del last[oldest]
            oldest = next(iter(last))

    async def _gather(self) -> None:
        if len(self._last_asked) < PAGE_WORTH:
            return
        for _ in range(_LONGEST_GATHERING):
            before = self._asked
            await asyncio.sleep(GATHER_SECONDS)
            if self._asked == before:
                return

    def _take_ready(self) -> _Waiting:
        now = asyncio.get_running_loop().time()
        ready: _Waiting = {}
        for lookup, all_asked in self._waiting.items():
            if all(asked.due <= now for asked in all_asked):
                ready[lookup] = all_asked
            elif taken := [asked for asked in all_asked if asked.due <= now]:
                ready[lookup] = taken
                all_asked[:] = [asked for asked in all_asked if asked not in taken]
        for lookup in [one for one, all_asked in ready.items() if all_asked is self._waiting[one]]:
            del self._waiting[lookup]
        return ready

    async def _round(self, ready: _Waiting) -> None:
        """Answer from pages as long as they are worth it; what is left over is asked for alone."""
        position: Mapping[str, Any] | None = None
        # The runs may be on the last pages: half of what the looks would cost alone may be spent in vain.
        worth = _number_of(ready) // 2
        pause = _pause(ready)
        while _number_of(ready) >= PAGE_WORTH:
            call = active_page(self._server_url, self._project, position)
            try:
                reply = await self._send(call.request)
            except TransientServerError as error:
                _fail(_all(ready), error)
                return
            try:
                page = call.parse(reply)
                worth += await self._hand_out(page, ready, pause) - PAGE_WORTH
            except TransientServerError:
                # Each flow reads it for itself, and names its own run in the message.
                _answer(_all(ready), reply)
                return
            except DstackError:
                # An answer for one run tells better what is wrong.
                return
            position = page.position
            if position is None or worth < 0:
                return

    async def _hand_out(self, page: ActivePage, ready: _Waiting, pause: float) -> int:
        """Answer what is asked about the page's runs; return how many looks that was."""
        found = answered = 0
        for sighting in page:
            for lookup in sighting.lookups:
                # Newest first: of two runs of a name the first is the one that has it.
                all_asked = ready.pop(lookup, None)
                if all_asked is not None:
                    found += 1
                    answered += self._tell(all_asked, sighting)
            if answered >= _HANDFUL:
                await asyncio.sleep(answered * pause)
                answered = 0
        await asyncio.sleep(answered * pause)
        return found

    def _tell(self, all_asked: list[Asked], sighting: Sighting) -> int:
        """Answer who is to be told; return how many."""
        now = asyncio.get_running_loop().time()
        ended = [asked for asked in all_asked if not asked.goes_on(sighting.run, now)]
        if ended:
            _answer(ended, sighting.reply)
            all_asked[:] = [asked for asked in all_asked if asked not in ended]
        if all_asked:
            # Mostly the same list goes back, under the same key: thousands of new ones would be garbage.
            lookup = all_asked[0].lookup
            if self._waiting.setdefault(lookup, all_asked) is not all_asked:
                self._waiting[lookup] += all_asked
        return len(ended)


def _pause(ready: _Waiting) -> float:
    """Return the seconds to pause for each that is woken; nobody pauses for plain looks."""
    intervals = [asked.step.interval for asked in _all(ready) if asked.step and asked.is_last]
    return min(_PAUSE_SECONDS, _PAUSES_SHARE * min(intervals) / len(intervals)) if intervals else 0.0


def _all(waiting: _Waiting) -> Iterable[Asked]:
    return (asked for all_asked in waiting.values() for asked in all_asked)


def _number_of(waiting: _Waiting) -> int:
    return sum(any(not asked.answer.done() for asked in all_asked) for all_asked in waiting.values())


def _answer(all_asked: Iterable[Asked], reply: Reply | None) -> None:
    for asked in all_asked:
        if not asked.answer.done():
            asked.answer.set_result(reply)


def _fail(all_asked: Iterable[Asked], error: TransientServerError) -> None:
    for asked in all_asked:
        if not asked.answer.done():
            asked.answer.set_exception(TransientServerError(error.message, retry_after=error.retry_after))
