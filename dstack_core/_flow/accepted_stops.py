"""Stops that the server accepted, so that a follower repeats one that the server dropped (PROTOCOL 1.7).

The problem: a server from 0.20 on that is short of CPU can accept a stop and then overwrite it. The process
that sent the stop may have ended by then; the run keeps running and costs money.

The idea: a client remembers the runs whose stop was accepted. Each flow that polls such a run anyway
(``follow``, ``wait``, ``logs``) passes the poll to ``insist``, which sends the stop again if the run is
active and not stopping.

Invariants: no request is made only to check a stop. A run whose stop holds is never seen active and not
stopping, so its stop is never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dstack_core._flow.steps import Op, call
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot

# Two processes that stop the same run must not add up to a burst of requests, and the server needs a moment
# to act on a stop. A longer pause lets a dropped stop cost more GPU time.
REPEAT_SECONDS = 5.0
# About two minutes of dropped stops while a run is followed; a server that drops more is broken, and more
# requests would not help it.
_MOST_REPEATS = 20
# A client that lives for weeks, as in a worker, stops any number of runs that nothing follows to their end.
# The oldest are forgotten: a dropped stop shows within seconds, so only the latest few need to be known.
_MOST_REMEMBERED = 1000


@dataclass(slots=True)
class _Accepted:
    abort: bool
    at: float
    repeats: int = 0


class Stops:
    """The stops that a client's server accepted, for the followers of these runs to repeat a dropped one.

    A run whose stop holds is never seen active and not stopping. ``clock`` gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accepted: dict[str, _Accepted] = {}

    def note(self, run_id: str, *, abort: bool, at: float | None = None) -> None:
        """Remember that the server accepted a stop, ``at`` that time; default: now."""
        at = self._clock() if at is None else at
        known = self._accepted.pop(run_id, None)
        self._accepted[run_id] = _Accepted(abort, at, known.repeats if known else 0)
        while len(self._accepted) > _MOST_REMEMBERED:
            del self._accepted[next(iter(self._accepted))]

    def is_pending(self, run_id: str) -> bool:
        """Whether a stop of this run was accepted and its end not seen since."""
        return run_id in self._accepted

    def send(self, api: Api, run: RunSnapshot) -> Op[None]:
        """Stop a run that was polled just now, unless its stop was accepted already."""
        if not self.is_pending(run.id) and not run.status.is_ending:
            at = self._clock()
            yield from call(api.stop(run.name, abort=False))
            self.note(run.id, abort=False, at=at)

    def insist(self, api: Api, run: RunSnapshot) -> Op[None]:
        """Repeat the stop if ``run``, polled just now, shows that the server dropped it.

        At most every 5 s and 20 times a run: a run that keeps running after that is left to the caller's
        time limit.
        """
        accepted = self._accepted.get(run.id)
        if accepted is None:
            return
        if not run.is_active or run.deleted:
            self._accepted.pop(run.id, None)
            return
        is_due = self._clock() - accepted.at >= REPEAT_SECONDS
        if not run.status.is_stopping and is_due and accepted.repeats < _MOST_REPEATS:
            accepted.repeats += 1
            accepted.at = self._clock()
            yield from call(api.stop(run.name, abort=accepted.abort))
