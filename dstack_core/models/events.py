"""The events that following a run reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.statuses import RunStatus


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events; ``progress`` resumes right after this event, here or in another process."""

    progress: Progress


@dataclass(frozen=True, slots=True)
class StatusChanged(Event):
    """A new status of the run.

    Attributes:
        status: The new status.
        previous: The status before, None for the first one.
        message: The server's detail on it (``exited (7)``), or None.
    """

    status: RunStatus
    previous: RunStatus | None
    message: str | None


@dataclass(frozen=True, slots=True)
class LogLines(Event):
    """Whole log lines of one job, in order, without their line ends.

    Of a line that carriage returns rewrote (a progress bar) the last state is reported.

    Attributes:
        lines: The lines (tuple of str).
        replica: The job's replica, counted from 0.
        node: The job's node, counted from 0.
        attempt: Counted from 0; grows when the server retries the job.
        submission_id: The server's key of this log.
        nodes: How many nodes the run has.
        replicas: How many replicas the run has.
        times: When the server logged each line (UTC, as ``2026-11-23T09:30:00.125000+00:00``); empty unless
            ``follow`` was asked for ``timestamps``.
    """

    lines: tuple[str, ...]
    replica: int
    node: int
    attempt: int
    submission_id: str
    nodes: int = 1
    replicas: int = 1
    times: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class PartialLine(Event):
    """The present state of a line that has not ended, such as a progress bar or a prompt; for display.

    It comes once the line has been open for 10 seconds, then at most every 30 seconds, and only if it has
    changed. The line itself is in a ``LogLines`` once it has ended.

    Attributes:
        line: What a terminal would show of the line now.
        replica: The job's replica, counted from 0.
        node: The job's node, counted from 0.
        attempt: Counted from 0; grows when the server retries the job.
        submission_id: The server's key of this log.
        nodes: How many nodes the run has.
        replicas: How many replicas the run has.
        times: When the server logged its last part, as in ``LogLines``: one time or none.
    """

    line: str
    replica: int
    node: int
    attempt: int
    submission_id: str
    nodes: int = 1
    replicas: int = 1
    times: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """What a run that has not started yet waits for; about once a minute, first after a minute.

    Attributes:
        text: What it waits for (``"capacity: gpu H100, on-demand"``), with what the server reports about it.
        since: Since when (aware).
    """

    text: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Reported(Event):
    """A message that the run reported, such as a metric; it is not among the log lines.

    Messages come in their order, before the log lines that were read with them.

    Attributes:
        kind: ``result``, ``metric``, ``progress``, ``table``, ``link``, ``image``, ``asset``, ``checkpoint``,
            ``skip``, or what a newer version of the run's own code sends (str).
        payload: The content, values that JSON has; the report protocol lists it for each kind.
        replica: The job's replica, counted from 0.
        node: The job's node, counted from 0.
        attempt: Counted from 0; grows when the server retries the job.
    """

    kind: str
    payload: Mapping[str, Any] = field(repr=False)
    replica: int = 0
    node: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class ReportsDropped(Event):
    """Messages that were left out.

    Attributes:
        reason: ``"broken"`` (shown as text in the log), ``"too large"`` or ``"too many"`` (str).
        count: How many were left out since the last such event (int).
    """

    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class ContactLost(Event):
    """A failed request that is retried.

    Attributes:
        error: What failed (str).
        silent_for: Seconds for which requests have failed now.
        gives_up_in: Seconds until ``ServerUnreachableError`` is raised.
    """

    error: str
    silent_for: float
    gives_up_in: float


@dataclass(frozen=True, slots=True)
class ContactRestored(Event):
    """The server's first reply after lost contact, which lasted ``silent_for`` seconds."""

    silent_for: float


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """The end of the run with its ``outcome``; always the last event, after the last log line."""

    outcome: Outcome
