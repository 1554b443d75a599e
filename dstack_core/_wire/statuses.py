"""Map what a server sends to ``RunStatus``, by its table; the table of reasons (PROTOCOL 1.6, 3.3)."""

from __future__ import annotations

from dstack_core.models.statuses import BY_JOB, BY_RUN, RESTARTING_SIGN, RunStatus

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
    "instance_unreachable": "failed: its machine could not be reached any more",
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
    "log_quota_exceeded": "failed: it wrote more logs than its quota",
}


def run_status(raw: str, *, message: str | None, reason: str | None, restarting: bool) -> RunStatus:
    """Map what a server says of a run to the documented statuses (PROTOCOL 3.3).

    ``raw`` is the run's status, ``message`` its or its job's status message, ``reason`` the run's
    termination reason; ``restarting`` tells that an attempt of its job is over. Unknown statuses are kept.
    """
    signs = [f"message: {message}", f"reason: {reason}", None]
    for sign in [RESTARTING_SIGN, *signs] if restarting else signs:
        if (raw, sign) in BY_RUN:
            return BY_RUN[raw, sign]
    return RunStatus(raw)


def job_status(raw: str) -> RunStatus:
    """Map the status of a job's attempt; an unknown one is kept."""
    # A job without a status is one that is not known: no reason to refuse the run's other fields.
    return BY_JOB.get(raw) or RunStatus(raw or "unknown")


def in_words(reason: str | None) -> str | None:
    """Return a reason for a person; an unknown one as it came, None for None."""
    return None if reason is None else _REASONS.get(reason, f"ended: {reason}")
