"""Runs whose container is held after their commands have failed (``debug_on_failure``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from dstack_core._flow.logs import LogOptions, read_lines
from dstack_core._flow.partial_lines import PartialLines
from dstack_core._flow.steps import Flow, Op, changing
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Call
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import DstackError, WaitTimeoutError
from dstack_core.models.events import Event, LogLines, Reported, ReportsDropped
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress, ReportedSoFar
from dstack_core.models.reports import ReportLimits

T = TypeVar("T")


def without_log(flow: Flow[T]) -> Flow[T]:
    """Return the flow without the events of the log, for callers that want only the run's end."""
    return changing(
        flow, lambda step: None if isinstance(step, LogLines | Reported | ReportsDropped) else step
    )


def without_earlier_hold(run: RunSnapshot, progress: Progress) -> Progress:
    """Return the progress without the hold of an attempt that the server has replaced by another one."""
    attempt = progress.reported.held.get("attempt")
    # Each poll of each follower comes here, and few runs are held.
    if attempt is None:
        return progress
    latest = [job.submissions[-1].attempt for job in run.jobs if job.submissions]
    if attempt >= max(latest, default=0):
        return progress
    return replace(progress, reported=replace(progress.reported, held={}, released=None))


def is_held(api: Api, run: RunSnapshot) -> Op[bool]:
    """Return whether the commands of an active run have failed and its container is held; reads its log."""
    if run.hold_seconds is None or run.status.is_ending:
        return False
    reported = yield from _reported(api, run, lambda: None)
    return bool(reported.held) and reported.released is None


def with_hold(
    api: Api, run: RunSnapshot, outcome: Outcome, seconds_left: Callable[[], float | None]
) -> Op[Outcome]:
    """Return the outcome of a run that has ended, as a follower knows it if its container was held.

    Reads the log of a run with ``debug_on_failure`` within the time that is left; without it the outcome
    stays what the server shows.
    """
    if run.hold_seconds is None or outcome.succeeded:
        return outcome
    try:
        reported = yield from _reported(api, run, seconds_left)
    except DstackError:
        return outcome
    return outcome.with_reports(reported) if reported.held else outcome


def _reported(api: Api, run: RunSnapshot, seconds_left: Callable[[], float | None]) -> Op[ReportedSoFar]:
    """Return what the latest attempts have written to the log."""

    def within_time(step: Any) -> Any:
        if isinstance(step, Event):
            return None
        if not isinstance(step, Call) or (left := seconds_left()) is None:
            return step
        if left <= 0:
            raise WaitTimeoutError(f"The log of run {run.name} was not read in time.")
        return step.within(left)

    log, progress = LogOptions(ReportLimits()), Progress(run.name, run.id)
    flow = read_lines(api, run, progress, log, PartialLines(lambda: 0.0))
    progress = yield from changing(flow, within_time)
    return without_earlier_hold(run, progress).reported
