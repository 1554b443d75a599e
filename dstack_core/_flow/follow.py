"""Follow a run to its end: read the status, then the logs, wait, again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from zlib import crc32

from dstack_core._flow.logs import read_lines
from dstack_core._flow.steps import Flow, Sleep, call
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import RunFinished, StatusChanged
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.statuses import RunStatus

# Each divides the next, so that no pause is longer than the next one while they grow.
_PAUSES = (12, 4, 2, 1)
_LONGEST_PAUSE_SECONDS = 60.0
# A burst of thousands of flows that wake in one moment would keep the event loop from all others.
_SPREAD_SECONDS = 1.0
_SPREAD_SHARE = 0.2
_EARLY_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """Say how to follow: ``poll_interval`` in seconds, ``logs`` whether log lines are wanted.

    ``wall_clock`` gives the seconds since the epoch. ``shared`` is for many flows in one process: they
    look at nearly the same moments, within a second behind the multiples of ``poll_interval``.
    """

    poll_interval: float
    logs: bool
    wall_clock: Callable[[], float]
    shared: bool = False

    def pause(self, run_id: str) -> Sleep:
        """Return the wait before the next look at a run."""
        if not self.shared:
            return Sleep(self.poll_interval)
        spread = min(_SPREAD_SECONDS, _SPREAD_SHARE * self.poll_interval)
        behind = crc32(run_id.encode()) % 1000 / 1000 * spread
        wait = self.poll_interval - (self.wall_clock() - behind) % self.poll_interval
        # Who woke a bit early for a moment has had it.
        return Sleep(wait if wait > _EARLY_SHARE * self.poll_interval else wait + self.poll_interval)


def follow(api: Api, progress: Progress, options: FollowOptions) -> Flow[Outcome]:
    """Report status changes and log lines until the run is finished; return its ``Outcome``.

    Every event carries the progress from which another process goes on right behind it. The logs are
    read after the status that says the run is over, so the last line precedes ``RunFinished``. Raises
    ``RunNotFoundError`` when the run is gone, and the other server errors.
    """
    silence = _Silence(options)
    while True:
        before = progress
        run = yield from call(api.get_run(progress.run_name, progress.run_id))
        if run is None:
            raise _gone(api, progress)
        progress = replace(progress, run_id=run.id)
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
        pause = options.pause(run.id)
        # Of thousands of flows that sleep, the garbage collector shall not find as many snapshots.
        del run
        yield pause


class _Silence:
    """Say when a log that gives nothing new is worth a look: less and less often.

    What is logged after a silence is read after at most as long again, and within a minute.
    """

    def __init__(self, options: FollowOptions) -> None:
        seconds = options.poll_interval
        self._pauses = [pause for pause in _PAUSES if pause * seconds <= _LONGEST_PAUSE_SECONDS]
        self._shared = options.shared
        self._silent_for = 0

    def look_due(self, run_id: str) -> bool:
        """Tell whether to look now."""
        pause = next((pause for pause in self._pauses if 3 * pause <= 2 * self._silent_for), 1)
        # Where thousands fell silent together, each look finds another part of them due.
        turn = crc32(run_id.encode()) if self._shared else 0
        return (self._silent_for + turn) % pause == 0

    def passed(self, *, any_new: bool) -> None:
        """Note what a look at the run gave."""
        self._silent_for = 0 if any_new else self._silent_for + 1


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
