"""Follow a run to its end: read the status, then the logs, wait, again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dstack_core._flow.logs import read_lines
from dstack_core._flow.steps import Flow, Sleep, call
from dstack_core._flow.stop import Stops
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import RunFinished, StatusChanged
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.statuses import RunStatus

_PATIENT_LOOKS = 4
_MOST_LEFT_OUT = 5


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """Say how to follow: ``poll_interval`` in seconds, ``logs`` whether log lines are wanted.

    ``wall_clock`` gives the seconds since the epoch. ``shared`` is for many flows in one process: they
    look at the same moments, the multiples of ``poll_interval``, and at a log that has been silent for
    some looks only at every second, third, ... sixth. ``stops`` are the stops that were asked for.
    """

    poll_interval: float
    logs: bool
    wall_clock: Callable[[], float]
    shared: bool = False
    stops: Stops = field(default_factory=Stops)

    def pause(self) -> Sleep:
        """Return the wait before the next look."""
        if not self.shared:
            return Sleep(self.poll_interval)
        return Sleep(self.poll_interval - self.wall_clock() % self.poll_interval)


def follow(api: Api, progress: Progress, options: FollowOptions) -> Flow[Outcome]:
    """Report status changes and log lines until the run is finished; return its ``Outcome``.

    Every event carries the progress from which another process goes on right behind it. The logs are
    read after the status that says the run is over, so the last line precedes ``RunFinished``. A stop that
    was asked for and that the server forgot is asked for again. Raises ``RunNotFoundError`` when the run is
    gone, and the other server errors.
    """
    silence = _Silence(options.shared)
    while True:
        before = progress
        run = yield from call(api.get_run(progress.run_name, progress.run_id))
        if run is None:
            raise _gone(api, progress)
        yield from options.stops.insist(api, run)
        progress = replace(progress, run_id=run.id)
        if run.is_active:
            progress = yield from _report_status(run, progress, options)
        if options.logs and (not run.is_active or progress != before or silence.look_due()):
            progress = yield from read_lines(api, run, progress)
            silence.looked(any_new=progress != before)
        if not run.is_active:
            progress = yield from _report_status(run, progress, options)
            outcome = outcome_of(run, api.run_url(run.id))
            yield RunFinished(progress, outcome)
            return outcome
        yield options.pause()


class _Silence:
    """Say when a log that gives nothing new is worth a look: less and less often, in small steps."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._silent_looks = 0
        self._left_out = 0

    def look_due(self) -> bool:
        """Tell whether to look now."""
        most = min(self._silent_looks // _PATIENT_LOOKS, _MOST_LEFT_OUT) if self._enabled else 0
        if self._left_out < most:
            self._left_out += 1
            return False
        self._left_out = 0
        return True

    def looked(self, *, any_new: bool) -> None:
        """Note what a look gave."""
        self._silent_looks = 0 if any_new else self._silent_looks + 1


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
