"""Changes of the status of runs and jobs, recorded as events (PROTOCOL 1.6)."""

from __future__ import annotations

from dstack_core.local.events import EventLog
from dstack_core.local.runs import Job, Run, now
from dstack_core.local.states import RUN_STATUS_OF_JOB_STATUS, RUN_STATUS_ORDER


class Transitions:
    """The only place that sets a status."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    def run(self, run: Run, status: str, reason: str | None = None) -> None:
        """Set the status of a run, and the reason if it ends."""
        old, run.status, run.last_processed_at = run.status, status, now()
        run.termination_reason = reason or run.termination_reason
        if old != status:
            self._events.status(run, None, old, status, run.termination_reason)

    def job(self, run: Run, job: Job, status: str, reason: str | None = None) -> None:
        """Set the status of a job's newest attempt, and the status of the run if that is behind."""
        submission = job.latest
        old, submission.status, submission.last_processed_at = submission.status, status, now()
        submission.termination_reason = reason
        if old != status:
            self._events.status(run, job, old, status, reason)
        implied = RUN_STATUS_OF_JOB_STATUS.get(status)
        if implied is not None and RUN_STATUS_ORDER.index(implied) > RUN_STATUS_ORDER.index(run.status):
            self.run(run, implied)
