"""Follow a run to its end: poll it, report its status and its log, wait for news, repeat.

The problem: a follower should report a change soon, but most polls of most runs show nothing new, and a log
that has been silent for an hour is not worth a request every five seconds.

The idea: after each report the follower yields one ``Wait``, which names what would be news and when to
continue without any. It does not know who polls meanwhile, how often exactly, or who else waits. Whenever
it continues, it reads the log, so ``due`` is how long a silent log may stay unread: that grows with the
silence.

A run that reported a message (``Reported``) within the last interval is read again after half of one: a
metric has waited for the server to fetch it from the machine already.

Invariants: the log is read after the status that ends the run, so that its last line precedes
``RunFinished``. A line that is logged after a silence is read after at most as long as the silence lasted (or
one poll, two where many runs are followed together), and within ``longest_log_pause``. What changed in
between is never lost: the next poll shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from dstack_core._flow.accepted_stops import Stops
from dstack_core._flow.cost_limit import seconds_to_limit, stop_at_limit
from dstack_core._flow.hold import without_earlier_hold
from dstack_core._flow.logs import LogOptions, read_lines
from dstack_core._flow.partial_lines import PartialLines
from dstack_core._flow.steps import Flow, Sleep, Wait, call
from dstack_core._flow.utilization import is_sample_due, sample, with_utilization
from dstack_core._flow.waiting_reports import WaitingReports
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Call, Reply, time_of
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core._wire.survival import passed_limit
from dstack_core.errors import RunNotFoundError
from dstack_core.models.events import RunFinished, StatusChanged
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.reports import ReportLimits
from dstack_core.models.statuses import RunStatus

# How long a person who follows one run waits at most for the first line after a silence. A longer pause saves
# requests: at a poll interval of 5 s an idle run costs 361 log reads an hour, with 60 s it would be 64. The
# docs promise the 15 s (``docs/performance.md``).
LONGEST_LOG_PAUSE = 15.0
# Where many runs are followed together, a log that flows is read at every second poll, as far as that is
# within these seconds. 100 runs with a line every 4 s cost 1,200 log reads a minute at a poll interval of
# 5 s, and 600 with this. A longer pause delays lines that a person may watch. The end of a run ends each
# wait.
CROWDED_LOG_PAUSE = 10.0
# The pauses between two reads of a silent log, in polls. Each divides the next: followers that are spread
# over the polls of one pause stay spread when it grows. 12 polls of 5 s are the minute that a shared client
# allows.
_LOG_PAUSES = (12, 4, 2, 1)
# The share of an interval after which a run that reports is read again. The server fetches a log every 2.8 s
# (measured on 0.22.5). At a poll interval of 5 s, 95 % of the messages arrive within 4.5 s with a half, and
# within 6.6 s with a whole interval. A smaller share costs more log reads for each run that reports.
_REPORTING_SHARE = 0.5
# Polls come a little early or late. Without a tolerance of this many polls the pauses grow a poll later.
_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """Options of ``follow``: ``poll_interval`` in seconds, ``logs`` whether log lines are wanted.

    ``wall_clock`` gives the seconds since the epoch. ``longest_log_pause`` (seconds) bounds the time between
    two reads of a silent log. ``stops`` are the stops that the server accepted. ``on_poll`` gets each run as
    the server showed it. ``report_limits`` bound what the run reports beside its log. With
    ``late_result`` the log of a run that succeeded is read again while it has no result. ``timestamps``:
    whether the time of each line is wanted. ``waiting_interval`` (seconds) is the time between two reports on
    what a run waits for; None: no reports. With ``utilization`` the outcome shows how busy the machine was. A
    run whose container is held after its commands have failed counts as finished, unless ``through_hold``.
    """

    poll_interval: float
    logs: bool
    wall_clock: Callable[[], float]
    longest_log_pause: float = LONGEST_LOG_PAUSE
    stops: Stops = field(default_factory=lambda: Stops(lambda: 0.0))
    on_poll: Callable[[RunSnapshot], None] | None = None
    report_limits: ReportLimits = field(default_factory=ReportLimits)
    late_result: bool = False
    timestamps: bool = False
    waiting_interval: float | None = None
    through_hold: bool = False
    utilization: bool = False

    @property
    def log_options(self) -> LogOptions:
        """Return how the log is read."""
        return LogOptions(self.report_limits, self.timestamps)

    @property
    def is_shared(self) -> bool:
        """Return whether many runs are followed together, as far as its pauses show."""
        return self.longest_log_pause > LONGEST_LOG_PAUSE

    def crowded_log_pause(self, pause: float) -> float | None:
        """Return ``pause`` where many runs are followed together; None: the same."""
        longer = 2 * self.poll_interval
        return longer if pause < longer <= CROWDED_LOG_PAUSE and self.logs else None

    def log_pause(self, silent_for: float) -> float:
        """Return the seconds to the next read of a log that has been silent for ``silent_for`` seconds."""
        longest = min(self.longest_log_pause, silent_for + _TOLERANCE * self.poll_interval)
        fitting = (pause for pause in _LOG_PAUSES if pause * self.poll_interval <= longest)
        return next(fitting, 1) * self.poll_interval


@dataclass(frozen=True, slots=True)
class _IsNews:
    """A test for news: whether a poll shows something other than ``seen``, which the last one showed."""

    seen: tuple[object, ...]
    stops: Stops

    def __call__(self, run: RunSnapshot) -> bool:
        return run.news != self.seen or self.when_unchanged(run.id)

    def when_unchanged(self, run_id: str) -> bool:
        # The only sign of a dropped stop is that the run keeps running.
        return self.stops.is_pending(run_id)


@dataclass(frozen=True, slots=True)
class _IsNewsOrLate(_IsNews):
    """The same; ``until`` that time of ``wall_clock``, from which on any poll is news.

    A wait counts polls, so it takes longer where the server replies late, while the run costs money.
    """

    until: float
    wall_clock: Callable[[], float]

    def __call__(self, run: RunSnapshot) -> bool:
        return run.news != self.seen or self.when_unchanged(run.id)

    def when_unchanged(self, run_id: str) -> bool:
        return self.wall_clock() >= self.until or self.stops.is_pending(run_id)


def follow(api: Api, progress: Progress, options: FollowOptions) -> Flow[Outcome]:
    """Report status changes and log lines until the run is finished; return its ``Outcome``.

    With ``options.through_hold`` it also waits while the run's container is held after a failure.
    Every event carries the progress with which another process can continue after it. A stop that the server
    accepted and dropped is sent again. Raises ``RunNotFoundError`` when the run is gone, and the other server
    errors.
    """
    poll, is_news = _poll(api, progress, options), _IsNews((), options.stops)
    last_new, last_message = options.wall_clock(), -math.inf
    partial = PartialLines(options.wall_clock, progress.cursors)
    log_options = options.log_options
    waiting = WaitingReports(options.waiting_interval, options.wall_clock, asks_often=not options.is_shared)
    run = yield from call(poll)
    while True:
        before = progress
        if run is None:
            raise _gone(api, progress)
        yield from options.stops.insist(api, run)
        if run.is_active and run.env and passed_limit(run, datetime.fromtimestamp(options.wall_clock(), UTC)):
            yield from options.stops.send(api, run)
        yield from stop_at_limit(api, run, options.stops)
        # From here on the id decides: another run may get the same name once this one has ended.
        if progress.run_id is None:
            progress = replace(progress, run_id=run.id)
            poll = _poll(api, progress, options)
        # A new status precedes the lines that were logged in it, but the last line precedes the end: the log
        # is complete only once the run has finished, so it is read between that poll and its report.
        if run.is_active:
            progress = yield from _report_status(run, progress, options)
            yield from waiting.report(api, run, progress)
        if options.logs:
            progress = yield from read_lines(api, run, progress, log_options, partial)
        progress = without_earlier_hold(run, progress)
        if run.is_active and progress.reported.held and not options.through_hold:
            outcome = _held_outcome(api, run, progress, options)
            if options.utilization:
                outcome = yield from with_utilization(api, run, progress, outcome, options.wall_clock())
            yield RunFinished(progress, outcome)
            return outcome
        if not run.is_active and options.late_result and run.status.is_success:
            progress = yield from _wait_for_result(api, run, progress, options)
        if not run.is_active:
            progress = yield from _report_status(run, progress, options)
            outcome = outcome_of(run, api.run_url(run.id)).with_reports(progress.reported)
            if options.utilization:
                outcome = yield from with_utilization(api, run, progress, outcome, options.wall_clock())
            yield RunFinished(progress, outcome)
            return outcome
        # Thousands of followers may wait, so each keeps few objects and creates few new ones per wait: many
        # new objects make the garbage collector scan all of them.
        if run.news != is_news.seen or type(is_news) is not _IsNews:
            is_news = _IsNews(run.news, options.stops)
        now = options.wall_clock()
        if progress != before:
            last_new = now
        if progress.reported.count > before.reported.count:
            last_message = now
        if now - last_message < options.poll_interval:
            # Also after a read without a message: the server fetches the log at a pace of its own, so with
            # whole intervals from there on, the next messages would be up to one and a half intervals late.
            due, in_crowd = _REPORTING_SHARE * options.poll_interval, None
        else:
            due = options.log_pause(now - last_new)
            in_crowd = options.crowded_log_pause(due)
        left = seconds_to_limit(run, options.poll_interval)
        if left is not None:
            due, in_crowd = min(due, left), None if in_crowd is None else min(in_crowd, left)
            is_news = _IsNewsOrLate(run.news, options.stops, now + left, options.wall_clock)
        if options.utilization and is_sample_due(run, progress, now):
            progress = yield from sample(api, run, progress, now)
        step = Wait(poll, is_news, options.poll_interval, due, in_crowd)
        # A snapshot is most of what a waiting follower would keep, and the next poll brings another one.
        del run
        run = yield step


def _held_outcome(api: Api, run: RunSnapshot, progress: Progress, options: FollowOptions) -> Outcome:
    """Return the outcome of a run whose commands have failed while its container is held."""
    outcome = outcome_of(run, api.run_url(run.id)).with_reports(progress.reported)
    # It has no end yet, so its duration is that of the commands: until now, by this machine's clock.
    duration = max(0.0, options.wall_clock() - time_of(run.submitted_at).timestamp())
    return replace(outcome, duration=duration)


# A log store may show the last lines some seconds after the run has ended. With fewer or quicker reads, a
# result is missing although the run reported it.
_LATE_READS = 3
_LATE_READ_PAUSE = 2.0


def _wait_for_result(
    api: Api, run: RunSnapshot, progress: Progress, options: FollowOptions
) -> Flow[Progress]:
    for _ in range(_LATE_READS):
        if progress.reported.results:
            break
        yield Sleep(_LATE_READ_PAUSE)
        cursors = {key: replace(cursor, drained=False) for key, cursor in progress.cursors.items()}
        progress = replace(progress, cursors=cursors)
        partial = PartialLines(options.wall_clock)
        progress = yield from read_lines(api, run, progress, options.log_options, partial)
    return progress


def _poll(api: Api, progress: Progress, options: FollowOptions) -> Call[RunSnapshot | None]:
    poll, on_poll = api.get_run(progress.run_name, progress.run_id), options.on_poll
    if on_poll is None:
        return poll

    def parse(reply: Reply) -> RunSnapshot | None:
        run = poll.parse(reply)
        if run is not None:
            on_poll(run)
        return run

    return replace(poll, parse=parse)


def _report_status(run: RunSnapshot, progress: Progress, options: FollowOptions) -> Flow[Progress]:
    if run.status == progress.status:
        return progress
    previous = RunStatus(progress.status) if progress.status else None
    # Part of the progress, so that a process that takes over knows how long the stop has taken already.
    stopping_since = (progress.stopping_since or options.wall_clock()) if run.status.is_stopping else None
    status = str(run.status)
    # Bounded by the number of statuses. A run that dstack retries keeps the times of its first attempt.
    since = {status: options.wall_clock(), **progress.since}
    progress = replace(progress, status=status, stopping_since=stopping_since, since=since)
    # A message that only repeats the status would be shown twice.
    message = None if run.message in (run.raw_status, str(run.status)) else run.message
    yield StatusChanged(progress, run.status, previous, message)
    return progress


def _gone(api: Api, progress: Progress) -> RunNotFoundError:
    return RunNotFoundError(
        f"the run {progress.run_name} (id {progress.run_id}) is no longer in project {api.project} on "
        f"{api.server_url}; it was deleted, so its outcome is unknown"
    )
