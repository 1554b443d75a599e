"""Statuses and reasons, and what they imply: the tables of PROTOCOL 1.6."""

from __future__ import annotations

RUN_FINISHED = frozenset({"terminated", "failed", "done"})
JOB_FINISHED = frozenset({"terminated", "aborted", "failed", "done"})

RUN_STATUS_OF_REASON = {
    "all_jobs_done": "done",
    "job_failed": "failed",
    "retry_limit_exceeded": "failed",
    "server_error": "failed",
    "stopped_by_user": "terminated",
    "aborted_by_user": "terminated",
}

JOB_STATUS_OF_REASON = {
    "done_by_runner": "done",
    "container_exited_with_error": "failed",
    "executor_error": "failed",
    "volume_error": "failed",
    "creating_container_error": "failed",
    "interrupted_by_no_capacity": "failed",
    "instance_unreachable": "failed",
    "failed_to_start_due_to_no_capacity": "failed",
    "terminated_by_user": "terminated",
    "terminated_by_server": "terminated",
    "scaled_down": "terminated",
    "max_duration_exceeded": "terminated",
    "aborted_by_user": "aborted",
}

RETRY_EVENT_OF_REASON = {
    "failed_to_start_due_to_no_capacity": "no-capacity",
    "interrupted_by_no_capacity": "interruption",
    "instance_unreachable": "error",
    "container_exited_with_error": "error",
    "creating_container_error": "error",
    "executor_error": "error",
    "volume_error": "error",
}

JOB_MESSAGE_OF_REASON = {
    "terminated_by_user": "stopped",
    "failed_to_start_due_to_no_capacity": "no capacity",
    "interrupted_by_no_capacity": "interrupted",
    "instance_unreachable": "error",
    "creating_container_error": "error",
    "executor_error": "error",
    "volume_error": "error",
}

JOB_ERROR_OF_REASON = {
    "max_duration_exceeded": "max duration exceeded",
    "instance_unreachable": "instance unreachable",
    "volume_error": "volume error",
}


# In the order that an attempt passes them; a run has the furthest status that one of its jobs has reached.
RUN_STATUS_OF_JOB_STATUS = {
    "submitted": "submitted",
    "provisioning": "provisioning",
    "pulling": "provisioning",
    "running": "running",
}
RUN_STATUS_ORDER = ("pending", "submitted", "provisioning", "running", "terminating")
