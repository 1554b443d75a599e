"""Stop a run, and see to it that the stop holds (PROTOCOL 1.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dstack_core._flow.steps import Op, Sleep, call
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot

_MOST_REPEATS = 20
_MOST_REMEMBERED = 1000
_PAUSE = 1.0


@dataclass(slots=True)
class _Asked:
    abort: bool
    repeats: int = 0


class Stops:
    """Remember which runs a client asked to stop, so that whoever waits for one of them can insist.

    Servers from 0.20 on that are short of CPU accept a stop and then overwrite it: the run, said to be
    terminating, is running again. A run whose stop holds is never seen active and not terminating.
    """

    def __init__(self) -> None:
        self._asked: dict[str, _Asked] = {}

    def note(self, run_id: str, *, abort: bool) -> None:
        """Note that the server accepted a stop."""
        self._asked.pop(run_id, None)
        self._asked[run_id] = _Asked(abort)
        while len(self._asked) > _MOST_REMEMBERED:
            del self._asked[next(iter(self._asked))]

    def is_asked(self, run_id: str) -> bool:
        """Tell whether a stop of this run was asked for and its end not seen since."""
        return run_id in self._asked

    def insist(self, api: Api, run: RunSnapshot) -> Op[None]:
        """Ask again if ``run``, looked at just now, shows that the server forgot a stop.

        At most 20 times a run: one that goes on all the same is left to the caller's time limit.
        """
        asked = self._asked.get(run.id)
        if asked is None:
            return
        if not run.is_active or run.deleted:
            self._asked.pop(run.id, None)
        elif not run.status.is_stopping and asked.repeats < _MOST_REPEATS:
            asked.repeats += 1
            yield from call(api.stop(run.name, abort=asked.abort))


@dataclass(frozen=True, slots=True)
class StopOptions:
    """Say how to stop: ``abort`` without the time to end, ``insist_for`` in seconds on ``clock``."""

    abort: bool
    insist_for: float
    clock: Callable[[], float]


def stop(api: Api, name: str, run_id: str | None, stops: Stops, options: StopOptions) -> Op[None]:
    """Ask the server to stop a run, unless it is over or another run has taken its name.

    The server stops by name (PROTOCOL 1.7), so the id is looked at first; without an id it is whichever
    run has that name. Then looks every second until the run is over, for at most ``insist_for`` seconds, and
    asks again whenever the stop was forgotten.
    """
    run = yield from call(api.get_run(name, run_id))
    if run is None or not run.is_active or run.deleted:
        return
    yield from call(api.stop(run.name, abort=options.abort))
    stops.note(run.id, abort=options.abort)
    deadline = options.clock() + options.insist_for
    while (left := deadline - options.clock()) > 0:
        yield Sleep(min(_PAUSE, left))
        now = yield from call(api.get_run(run.name, run.id))
        if now is None:
            return
        yield from stops.insist(api, now)
        if not now.is_active or now.deleted:
            return
