"""The polls of one run that a round answers, and when they are due.

The problem: followers that begin together would poll, and read their logs, in the same millisecond, each
time: with thousands of them the burst blocks the event loop. Polls that are spread over the whole interval do
not help either: too few are due together to share pages.

The idea: polls are due at multiples of the interval on the clock, so that rounds are full, each run's a fixed
fraction of a second later, so that they are not all due at once. The fraction comes from a checksum of the
run's id or name: no state, and the same in every process. A wait without news ends on the run's own turn.

Invariants: the polls of a wait are an interval apart. Followers that begin together are spread over the polls
of their waits, and each poll ends an equal share of them. A wait costs no timer and no task, only this
object.
"""

from __future__ import annotations

import asyncio
from zlib import crc32

from dstack_core._flow.steps import Wait
from dstack_core._wire.http_messages import Reply
from dstack_core._wire.lookups import Lookup, Sighting

# The polls of one interval are spread over a second, or this share of a short interval, and answered in one
# round. A wider spread delays news, a narrower one wakes thousands of flows in one moment.
_SPREAD_SECONDS = 1.0
_SPREAD_SHARE = 0.2
# A timer may end a moment early: a poll that is due within this share of the interval is the one just made.
# Without it that poll would come twice; a large share would skip polls after a slow one.
EARLY_SHARE = 0.05


def seconds_to_poll(interval: float, run_key: str, wall_clock: float) -> float:
    """Return the seconds to a run's next poll: a fixed part of a second behind a multiple of ``interval``."""
    left = interval - (wall_clock - _behind(interval, run_key)) % interval
    return left if left > EARLY_SHARE * interval else left + interval


def polls_until_turn(polls: int, interval: float, run_key: str, wall_clock: float) -> int:
    """Return the number of polls, at most ``polls``, after which a wait without news ends: the run's turn.

    Of many waits of equal length, every poll ends an equal share, whenever they began.
    """
    # Polls are numbered from the epoch on, and every run has a turn of its own among them.
    next_poll = wall_clock + seconds_to_poll(interval, run_key, wall_clock)
    number = round((next_poll - _behind(interval, run_key)) / interval)
    return 1 + (-number - crc32(run_key.encode())) % polls


def _behind(interval: float, run_key: str) -> float:
    return crc32(run_key.encode()) % 1000 / 1000 * min(_SPREAD_SECONDS, _SPREAD_SHARE * interval)


class PendingPoll:
    """One poll, or a wait that takes several.

    ``due`` is the time of the next poll (on ``clock.monotonic``), ``left`` the number of polls after which a
    wait without news ends. ``answer`` becomes the reply, or None if the run must be polled alone. ``seen`` is
    the fingerprint of the last sighting without news.
    """

    __slots__ = ("answer", "due", "left", "lookup", "seen", "wait")

    def __init__(
        self,
        lookup: Lookup,
        answer: asyncio.Future[Reply | None],
        due: float,
        wait: Wait | None = None,
        left: int = 1,
    ) -> None:
        self.lookup = lookup
        self.answer = answer
        self.due = due
        self.wait = wait
        self.left = left
        self.seen: int | None = None

    @property
    def is_last(self) -> bool:
        """Whether the next poll ends it, whatever that shows."""
        return self.left <= 1

    @property
    def latest(self) -> float:
        """The latest time at which its round begins."""
        interval = self.wait.interval if self.wait else 0.0
        return self.due + min(_SPREAD_SECONDS, _SPREAD_SHARE * interval)

    def continues(self, sighting: Sighting, now: float) -> bool:
        """Whether a sighting shows nothing that ends this wait; then its next poll is an interval later.

        Raises ``ProtocolError`` if the sighting cannot be read.
        """
        wait = self.wait
        if wait is None or self.is_last or self.answer.done():
            return False
        if sighting.fingerprint == self.seen:
            ends = wait.is_news.when_unchanged(sighting.run_id)
        else:
            ends = wait.ends_with(sighting.run)
        if ends:
            return False
        self.seen = sighting.fingerprint
        # Moved on in place: a new object for each of thousands of waits at each poll would be garbage, and
        # collecting that garbage holds up the event loop.
        self.left -= 1
        # Polls that were missed while the server was slow are not made up for.
        self.due += wait.interval * (1 + max(0.0, now - self.due) // wait.interval)
        return True
