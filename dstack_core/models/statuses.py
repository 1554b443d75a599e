"""The one table of run statuses, and the spot policies.

Servers use eight statuses for runs and nine for jobs; the documented API has other names, and more of them.
``RunStatus`` maps between the two, and each of its members carries its row of the table: what a server sends
for it, the phase of the run, and the percent that a progress bar shows. Every other module uses this table:
``run_status`` and ``job_status`` map with it, and ``is_finished`` and the other properties read the phase.

Where the columns come from:

* The names: PROTOCOL 3.3 (the documented 15) and ``provisioning``, which today's servers added (1.6).
* What a server sends: PROTOCOL 1.6 for the statuses, 3.3 for the signs. A sign distinguishes two statuses
  that have the same raw status: a status message, a termination reason, or that a job is tried again.
  ``building``, ``uploading`` and ``stopped`` are never sent.
* The phase: PROTOCOL 1.6, which lists the statuses of a finished run. Logs may exist from the phase
  ``RUNNING`` on (PROTOCOL 1.8).
* The percent: ours, for progress bars. A server reports nothing finer than the status.

A newer server may send a status that is not in the table. It is kept unchanged, in the phase ``RUNNING``: the
run is still watched, and its log is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import NamedTuple, Self


class Phase(Enum):
    """The part of its life that a run is in; exactly one at a time."""

    BEFORE_START = "before start"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "finished: succeeded"
    FAILED = "finished: failed"
    STOPPED = "finished: stopped"


_FINISHED = (Phase.SUCCEEDED, Phase.FAILED, Phase.STOPPED)


class _Row(NamedTuple):
    """A row of the table.

    ``run``: the statuses of a run that mean this one, with ``sign`` if it has one; ``job``: that of a job.
    """

    phase: Phase
    percent: float
    run: tuple[str, ...] = ()
    sign: str | None = None
    job: str | None = None


_UNKNOWN = _Row(Phase.RUNNING, 50.0)


class RunStatus(StrEnum):
    """The status of a run: the documented 15, and ``PROVISIONING``.

    Members are strings, so ``"Run: " + run.status()`` works. A status that only a newer server has becomes a
    member with that value instead of an error. Source: the documented API, "RunStatus"; PROTOCOL 3.3 lists
    which of them today's servers can show.
    """

    _value_: str
    _row: _Row

    def __new__(cls, value: str, row: _Row = _UNKNOWN) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member._row = row
        return member

    # fmt: off
    PENDING = "pending", _Row(Phase.BEFORE_START, 5.0, run=("pending",))
    SUBMITTED = "submitted", _Row(Phase.BEFORE_START, 5.0, run=("submitted",), job="submitted")
    PROVISIONING = "provisioning", _Row(Phase.BEFORE_START, 20.0, run=("provisioning",), job="provisioning")
    DOWNLOADING = "downloading", _Row(
        Phase.BEFORE_START, 35.0, run=("submitted", "provisioning"), sign="message: pulling", job="pulling")
    BUILDING = "building", _Row(Phase.BEFORE_START, 40.0)
    RUNNING = "running", _Row(Phase.RUNNING, 50.0, run=("running",), job="running")
    UPLOADING = "uploading", _Row(Phase.RUNNING, 80.0)
    STOPPING = "stopping", _Row(Phase.STOPPING, 90.0, run=("terminating",), sign="reason: stopped_by_user")
    STOPPED = "stopped", _Row(Phase.STOPPED, 100.0)
    RESTARTING = "restarting", _Row(
        Phase.BEFORE_START, 5.0, run=("pending", "submitted"), sign="a job is tried again")
    TERMINATING = "terminating", _Row(Phase.STOPPING, 90.0, run=("terminating",), job="terminating")
    TERMINATED = "terminated", _Row(Phase.STOPPED, 100.0, run=("terminated",), job="terminated")
    ABORTING = "aborting", _Row(Phase.STOPPING, 90.0, run=("terminating",), sign="reason: aborted_by_user")
    ABORTED = "aborted", _Row(
        Phase.STOPPED, 100.0, run=("terminated",), sign="reason: aborted_by_user", job="aborted")
    FAILED = "failed", _Row(Phase.FAILED, 100.0, run=("failed",), job="failed")
    DONE = "done", _Row(Phase.SUCCEEDED, 100.0, run=("done",), job="done")
    # fmt: on

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str) or not value:
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = value.upper().replace("-", "_")
        unknown._value_ = value
        unknown._row = _UNKNOWN
        return unknown

    @property
    def is_before_start(self) -> bool:
        """Whether the commands have not started yet, or have to start again; there is no log of them."""
        return self._row.phase is Phase.BEFORE_START

    @property
    def has_no_machine(self) -> bool:
        """Whether a machine is still to be found, the first or the next one."""
        return self in (RunStatus.PENDING, RunStatus.SUBMITTED, RunStatus.RESTARTING)

    @property
    def is_active(self) -> bool:
        """Whether the run has not finished."""
        return self._row.phase not in _FINISHED

    @property
    def is_stopping(self) -> bool:
        """Whether the run is being stopped, so that it will finish whatever its commands do."""
        return self._row.phase is Phase.STOPPING

    @property
    def is_finished(self) -> bool:
        """Whether the run has finished: done, failed, terminated, aborted or stopped."""
        return self._row.phase in _FINISHED

    @property
    def is_ending(self) -> bool:
        """Whether the run has finished or is stopping, so that there is nothing left to stop."""
        return self.is_finished or self.is_stopping

    @property
    def is_success(self) -> bool:
        """Whether the run finished successfully."""
        return self._row.phase is Phase.SUCCEEDED

    @property
    def was_stopped(self) -> bool:
        """Whether the run finished because it was stopped or aborted."""
        return self._row.phase is Phase.STOPPED

    @property
    def percent(self) -> float:
        """What a progress bar of the run shows: 0 to 100, and 100 only for a finished run."""
        return self._row.percent


def _by_run() -> Mapping[tuple[str, str | None], RunStatus]:
    return {(raw, status._row.sign): status for status in RunStatus for raw in status._row.run}


# The table by what a server sends: for a run its raw status with the sign, for a job its raw status.
BY_RUN: Mapping[tuple[str, str | None], RunStatus] = _by_run()
BY_JOB: Mapping[str, RunStatus] = {status._row.job: status for status in RunStatus if status._row.job}
RESTARTING_SIGN = str(RunStatus.RESTARTING._row.sign)


class SpotPolicy(StrEnum):
    """The choice between spot and on-demand instances.

    Without a policy today's servers take on-demand instances (PROTOCOL 3.2). The documented name
    ``ON_DEMAN`` is a typing error that is kept as an alias.
    """

    SPOT = "spot"
    ON_DEMAND = "on-demand"
    ON_DEMAN = "on-demand"
    ONDEMAND = "on-demand"
    AUTO = "auto"


_REASONS = {
    "all_jobs_done": "finished",
    "done_by_runner": "finished",
    "job_failed": "failed",
    "retry_limit_exceeded": "failed: the time limit for retries passed",
    "stopped_by_user": "was stopped on request",
    "terminated_by_user": "was stopped on request",
    "aborted_by_user": "was aborted by a user",
    "server_error": "failed: an error of the dstack server",
    "gateway_error": "failed: the gateway could not be set up",
    "failed_to_start_due_to_no_capacity": "failed: no capacity, no machine could be had",
    "interrupted_by_no_capacity": "failed: its machine was taken away (spot interruption or no capacity)",
    "instance_unreachable": "failed: its machine could no longer be reached",
    "instance_access_revoked": "failed: the access to its machine was revoked",
    "waiting_instance_limit_exceeded": "failed: its machine took too long to start",
    "waiting_runner_limit_exceeded": "failed: its container took too long to start",
    "volume_error": "failed: a volume could not be attached",
    "scaled_down": "was scaled down",
    "terminated_by_server": "was terminated by the dstack server",
    "inactivity_duration_exceeded": "was terminated: its inactivity limit passed",
    "terminated_due_to_utilization_policy": "was terminated: its GPU utilization was below the policy",
    "container_exited_with_error": "failed: its command exited with an error",
    "ports_binding_failed": "failed: a port could not be bound",
    "creating_container_error": "failed: its container could not be created",
    "executor_error": "failed: an error of the dstack runner",
    "max_duration_exceeded": "failed: its max_duration passed",
    "max_cost_exceeded": "was stopped at its cost limit",
    "log_quota_exceeded": "failed: it wrote more logs than its quota",
}


def run_status(raw: str, *, message: str | None, reason: str | None, restarting: bool) -> RunStatus:
    """Map what a server returns for a run to the documented statuses (PROTOCOL 3.3); unknown ones are kept.

    Args:
        raw: The run's raw status.
        message: The status message of the run or its job, or None.
        reason: The run's termination reason, or None.
        restarting: Whether an attempt of its job has ended already.
    """
    # The most specific sign first.
    signs = [f"message: {message}", f"reason: {reason}", None]
    for sign in [RESTARTING_SIGN, *signs] if restarting else signs:
        if (raw, sign) in BY_RUN:
            return BY_RUN[raw, sign]
    return RunStatus(raw)


def job_status(raw: str) -> RunStatus:
    """Map the status of a job's attempt; an unknown one is kept."""
    # An empty status must not prevent reading the run's other fields.
    return BY_JOB.get(raw) or RunStatus(raw or "unknown")


_SPANS = {
    RunStatus.PENDING: "queued",
    RunStatus.SUBMITTED: "queued",
    RunStatus.RESTARTING: "queued",
    RunStatus.PROVISIONING: "provisioning",
    RunStatus.DOWNLOADING: "pulling",
}


def span_of(status: RunStatus) -> str:
    """Return what a trace calls the time that a run spends in a status; empty at and after its end."""
    return _SPANS.get(status, "" if status.is_ending else "running")


def in_words(reason: str | None) -> str | None:
    """Return a reason for a person; an unknown one as it came, None for None."""
    return None if reason is None else _REASONS.get(reason, f"ended: {reason}")
