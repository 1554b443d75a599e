"""Runs, jobs and submissions: their fields and their JSON form (PROTOCOL 1.5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

from dstack_core import clock
from dstack_core.local.logs import iso
from dstack_core.local.specs import RunSpec, ServiceConfiguration
from dstack_core.local.states import (
    JOB_ERROR_OF_REASON,
    JOB_FINISHED,
    JOB_MESSAGE_OF_REASON,
    RETRY_EVENT_OF_REASON,
    RUN_FINISHED,
)


def now() -> datetime:
    """Return the current time in UTC."""
    return clock.now()


@dataclass
class Submission:
    """One attempt of a job; its id is the key of its logs."""

    num: int
    deployment_num: int
    id: str = field(default_factory=lambda: str(uuid4()))
    submitted_at: datetime = field(default_factory=now)
    last_processed_at: datetime = field(default_factory=now)
    finished_at: datetime | None = None
    status: str = "submitted"
    termination_reason: str | None = None
    termination_message: str | None = None
    exit_status: int | None = None
    provisioning_data: dict[str, Any] | None = None
    runtime_data: dict[str, Any] | None = None
    # What `wire` returned since the end: each poll shows all attempts, and nothing of an ended one changes.
    _final: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        """Return whether this attempt has ended."""
        return self.status in JOB_FINISHED

    @property
    def retry_event(self) -> str | None:
        """Return the retry event that ended this attempt, or None if something else did (PROTOCOL 1.6)."""
        return RETRY_EVENT_OF_REASON.get(self.termination_reason or "")

    def _status_message(self) -> str:
        if self.status in ("done", "failed") and self.exit_status is not None:
            return f"exited ({self.exit_status})"
        if self.finished:
            return JOB_MESSAGE_OF_REASON.get(self.termination_reason or "", self.status)
        return self.status

    def seconds(self) -> float:
        """Return how many seconds this attempt has occupied a machine."""
        if self.provisioning_data is None:
            return 0.0
        return ((self.finished_at or now()) - self.submitted_at).total_seconds()

    def wire(self) -> dict[str, Any]:
        """Return the submission as JSON data."""
        if self._final is not None:
            return self._final
        data = {
            "id": self.id,
            "submission_num": self.num,
            "deployment_num": self.deployment_num,
            "submitted_at": iso(self.submitted_at),
            "last_processed_at": iso(self.last_processed_at),
            "finished_at": None if self.finished_at is None else iso(self.finished_at),
            "inactivity_secs": None,
            "status": self.status,
            "status_message": self._status_message(),
            "termination_reason": self.termination_reason,
            "termination_reason_message": self.termination_message,
            "exit_status": self.exit_status,
            "job_provisioning_data": self.provisioning_data,
            "job_runtime_data": self.runtime_data,
            "error": JOB_ERROR_OF_REASON.get(self.termination_reason or ""),
            "probes": [],
            "image_pull_progress": None,
        }
        if self.finished:
            self._final = data
        return data


@dataclass
class Job:
    """A job spec and all its attempts, oldest first; `is_wanted` is False once an update replaced the job."""

    spec: dict[str, Any]
    submissions: list[Submission]
    is_wanted: bool = True

    @property
    def latest(self) -> Submission:
        """Return the newest attempt."""
        return self.submissions[-1]

    def wire(self, limit: int | None) -> dict[str, Any]:
        """Return the job as JSON data with its `limit` newest attempts (None: all)."""
        kept = self.submissions if limit is None else self.submissions[len(self.submissions) - limit :]
        return {
            "job_spec": self.spec,
            "job_submissions": [submission.wire() for submission in (kept if limit != 0 else [])],
            # Always null, because there is no SSH proxy and no shell or IDE that a client could open.
            "job_connection_info": None,
        }


@dataclass
class Run:
    """A run; its `spec` has all defaults."""

    project: str
    user: str
    spec: RunSpec
    jobs: list[Job]
    price: float
    id: str = field(default_factory=lambda: str(uuid4()))
    submitted_at: datetime = field(default_factory=now)
    last_processed_at: datetime = field(default_factory=now)
    status: str = "submitted"
    termination_reason: str | None = None
    fleet: dict[str, Any] | None = None
    deployment_num: int = 0
    deleted: bool = False
    # The configuration as the client sent it, and how many stop requests named the run.
    submitted: dict[str, Any] = field(default_factory=dict)
    stop_requests: int = 0

    @property
    def name(self) -> str:
        """Return the name, which every stored run has."""
        return self.spec.run_name or ""

    @property
    def finished(self) -> bool:
        """Return whether the run has its final status."""
        return self.status in RUN_FINISHED

    def _status_message(self) -> str:
        latest = [job.latest for job in self.jobs]
        pulling = bool(latest) and all(submission.status == "pulling" for submission in latest)
        if pulling and self.status in ("submitted", "provisioning"):
            return "pulling"
        if self.status in ("submitted", "pending") and any(
            submission.finished and submission.retry_event for submission in latest
        ):
            return "retrying"
        return self.status

    def _service(self) -> dict[str, Any] | None:
        configuration = self.spec.configuration
        if not isinstance(configuration, ServiceConfiguration):
            return None
        url = f"/proxy/services/{self.project}/{self.name}/"
        wanted = configuration.model
        if wanted is None:
            return {"url": url, "model": None, "options": {}}
        model = {
            "name": wanted.name,
            "base_url": url.rstrip("/") + getattr(wanted, "prefix", "/v1"),
            "type": wanted.type,
        }
        return {"url": url, "model": model, "options": {"openai": {"model": wanted.model_dump(mode="json")}}}

    def cost(self) -> float:
        """Return the cost so far in USD, with 4 digits (PROTOCOL 1.5)."""
        seconds = sum(submission.seconds() for job in self.jobs for submission in job.submissions)
        return round(seconds / 3600 * self.price, 4)

    def wire(self, include_jobs: bool = True, submissions_limit: int | None = None) -> dict[str, Any]:
        """Return the run as JSON data."""
        jobs = [job.wire(submissions_limit) for job in self.jobs] if include_jobs else []
        newest = jobs[0]["job_submissions"][-1:] if jobs else []
        return {
            "id": self.id,
            "project_name": self.project,
            "user": self.user,
            "fleet": self.fleet,
            "submitted_at": iso(self.submitted_at),
            "last_processed_at": iso(self.last_processed_at),
            "status": self.status,
            "status_message": self._status_message(),
            "termination_reason": self.termination_reason,
            "run_spec": self.spec.model_dump(mode="json"),
            "jobs": jobs,
            "latest_job_submission": newest[0] if newest else None,
            "cost": self.cost(),
            "service": self._service(),
            "deployment_num": self.deployment_num,
            "error": "retry limit exceeded" if self.termination_reason == "retry_limit_exceeded" else None,
            "deleted": self.deleted,
            "next_triggered_at": None,
        }
