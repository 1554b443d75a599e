"""What following a run reports."""

from __future__ import annotations

from dataclasses import dataclass

from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.statuses import RunStatus


@dataclass(frozen=True, slots=True)
class Event:
    """Be the base of all events; ``progress`` is what resumes right after this event."""

    progress: Progress


@dataclass(frozen=True, slots=True)
class StatusChanged(Event):
    """Report a new status; ``message`` is what the server says beyond it (``exited (7)``), or None."""

    status: RunStatus
    previous: RunStatus | None
    message: str | None


@dataclass(frozen=True, slots=True)
class LogLines(Event):
    """Report whole log lines of one job, in order, without their line ends.

    ``lines`` (tuple of str); ``replica``, ``node`` (int) and ``attempt`` (int, grows when the server
    retries the job) say whose they are; ``submission_id`` is the server's key of that log. Of a line
    that a carriage return rewrote (a progress bar) the last state is reported. ``nodes`` and
    ``replicas`` (int) are how many of them the run has.
    """

    lines: tuple[str, ...]
    replica: int
    node: int
    attempt: int
    submission_id: str
    nodes: int = 1
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class ContactLost(Event):
    """Report that a request failed and is tried again.

    ``error`` (str) says how, ``silent_for`` (seconds) for how long now, ``gives_up_in`` (seconds) when
    ``ServerUnreachableError`` will be raised.
    """

    error: str
    silent_for: float
    gives_up_in: float


@dataclass(frozen=True, slots=True)
class ContactRestored(Event):
    """Report that the server answers again after ``silent_for`` seconds."""

    silent_for: float


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """Report the end of the run; always the last event, after the last log line."""

    outcome: Outcome
