"""Follow a run to its end: read the status, then the logs, wait, again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from zlib import crc32

from dstack_core._flow.logs import read_lines
from dstack_core._flow.steps import Flow, Rest, call
from dstack_core._flow.stop import Stops
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import RunFinished, StatusChanged
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.statuses import RunStatus

# Each divides the next, so that no pause is longer than the next one while they grow.
_PAUSES = (12, 4, 2, 1)
_LONGEST_PAUSE_SECONDS = 15.0
_LONGEST_SHARED_PAUSE_SECONDS = 60.0
# A burst of thousands of flows that wake in one moment would keep the event loop from all others.
_SPREAD_SECONDS = 1.0
_SPREAD_SHARE = 0.2
_EARLY_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """Say how to follow: ``poll_interval`` in seconds, ``logs`` whether log lines are wanted.

    ``wall_clock`` gives the seconds since the epoch. ``shared`` is for many flows in one process: they
    look at nearly the same moments, within a second behind the multiples of ``poll_interval``. ``stops``
    are the stops that the server accepted. ``on_poll`` gets each run as the server showed it.
    """

    poll_interval: float
    logs: bool
    wall_clock: Callable[[], float]
    shared: bool = False
    stops: Stops = field(default_factory=lambda: Stops(lambda: 0.0))
    on_poll: Callable[[RunSnapshot], None] = lambda run: None

    def pause(self, run_id: str) -> float:
        """Return the seconds to the next look at a run."""
        if not self.shared:
            return self.poll_interval
        spread = min(_SPREAD_SECONDS, _SPREAD_SHARE * self.poll_interval)
        behind = crc32(run_id.encode()) % 1000 / 1000 * spread
        left = self.poll_interval - (self.wall_clock() - behind) % self.poll_interval
        # A timer may end a moment early, and the look that it was for is due then, not that one and another.
        return left if left > _EARLY_SHARE * self.poll_interval else left + self.poll_interval


@dataclass(frozen=True, slots=True)
class _IsNews:
    """Tell whether a look shows something that the last one, which showed ``seen``, did not."""

    seen: tuple[object, ...]
    stops: Stops

    def __call__(self, run: RunSnapshot) -> bool:
        # A stop that the server forgot shows in nothing but that the run goes on.
        return run.news != self.seen or self.stops.is_pending(run.id)


def follow(api: Api, progress: Progress, options: FollowOptions) -> Flow[Outcome]:
    """Report status changes and log lines until the run is finished; return its ``Outcome``.

    Every event carries the progress from which another process goes on right behind it. The logs are
    read after the status that says the run is over, so the last line precedes ``RunFinished``. A stop that
    was asked for and that the server forgot is asked for again. Raises ``RunNotFoundError`` when the run is
    gone, and the other server errors.
    """
    silence = _Silence(options)
    look, is_news = api.get_run(progress.run_name, progress.run_id), _IsNews((), options.stops)
    run = yield from call(look)
    while True:
        before = progress
        if run is None:
            raise _gone(api, progress)
        options.on_poll(run)
        yield from options.stops.insist(api, run)
        if progress.run_id is None:
            progress = replace(progress, run_id=run.id)
            look = api.get_run(run.name, run.id)
        if run.is_active:
            progress = yield from _report_status(run, progress, options)
        if options.logs and (not run.is_active or progress != before or silence.look_due(run.id)):
            progress = yield from read_lines(api, run, progress)
        silence.passed(any_new=progress != before)
        if not run.is_active:
            progress = yield from _report_status(run, progress, options)
            outcome = outcome_of(run, api.run_url(run.id))
            yield RunFinished(progress, outcome)
            return outcome
        # Thousands of flows may rest for long: what they keep is little, and little of it is new each time,
        # for the garbage collector goes through all of it whenever much was added.
        if run.news != is_news.seen:
            is_news = _IsNews(run.news, options.stops)
        rounds = silence.rounds_to_look(run.id)
        step = Rest(options.pause(run.id), look, is_news, options.poll_interval, rounds)
        del run
        run, rounds = yield step
        silence.passed_over(rounds - 1)


class _Silence:
    """Say when a log that gives nothing new is worth a look: less and less often.

    What is logged after a silence is read after at most as long again, and within 15 seconds; within a
    minute where many flows share a process.
    """

    def __init__(self, options: FollowOptions) -> None:
        longest = _LONGEST_SHARED_PAUSE_SECONDS if options.shared else _LONGEST_PAUSE_SECONDS
        self._pauses = [pause for pause in _PAUSES if pause * options.poll_interval <= longest]
        self._shared = options.shared
        self._silent_for = 0

    def look_due(self, run_id: str, looks_later: int = 0) -> bool:
        """Tell whether to look now, or after so many more looks at the run without news."""
        silent_for = self._silent_for + looks_later
        pause = next((pause for pause in self._pauses if 3 * pause <= 2 * silent_for), 1)
        # Where thousands fell silent together, each look finds another part of them due.
        turn = crc32(run_id.encode()) if self._shared else 0
        return (silent_for + turn) % pause == 0

    def rounds_to_look(self, run_id: str) -> int:
        """Return after how many looks at the run its log is due, if they are all without news."""
        return next(rounds for rounds in count(1) if self.look_due(run_id, rounds - 1))

    def passed(self, *, any_new: bool) -> None:
        """Note what a look at the run gave."""
        self._silent_for = 0 if any_new else self._silent_for + 1

    def passed_over(self, looks: int) -> None:
        """Note looks that nobody had to be told of."""
        self._silent_for += looks


def _report_status(run: RunSnapshot, progress: Progress, options: FollowOptions) -> Flow[Progress]:
    if run.status == progress.status:
        return progress
    previous = RunStatus(progress.status) if progress.status else None
    stopping_since = (progress.stopping_since or options.wall_clock()) if run.status.is_stopping else None
    progress = replace(progress, status=str(run.status), stopping_since=stopping_since)
    message = None if run.message in (run.raw_status, str(run.status)) else run.message
    yield StatusChanged(progress, run.status, previous, message)
    return progress


def _gone(api: Api, progress: Progress) -> RunNotFoundError:
    return RunNotFoundError(
        f"the run {progress.run_name} (id {progress.run_id}) is no longer in project {api.project} on "
        f"{api.server_url}; somebody deleted it, so its outcome cannot be told"
    )
