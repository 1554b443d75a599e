"""The documented statuses, each with a server's reply that shows it or the reason why none can."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dstack_core import RunStatus, SpotPolicy
from dstack_core._wire.runs import parse_run
from tests.core.scripted import recorded

# Recorded replies of real servers; PROTOCOL 3.3.
SHOWN = [
    ("scheduled_0.22.5", RunStatus.PENDING),
    ("submitted_0.22.5", RunStatus.SUBMITTED),
    ("provisioning_0.18.44", RunStatus.PROVISIONING),
    ("pulling_0.22.5", RunStatus.DOWNLOADING),
    ("running_0.22.5", RunStatus.RUNNING),
    ("restarting_0.22.5", RunStatus.RESTARTING),
    ("resubmitted_0.22.5", RunStatus.RESTARTING),
    ("stopping_0.22.5", RunStatus.STOPPING),
    ("aborting_0.22.5", RunStatus.ABORTING),
    ("terminating_0.22.5", RunStatus.TERMINATING),
    ("stopped_0.22.5", RunStatus.TERMINATED),
    ("aborted_0.22.5", RunStatus.ABORTED),
    ("failed_0.22.5", RunStatus.FAILED),
    ("done_0.22.5", RunStatus.DONE),
]
# Servers no longer build images, code is uploaded by the client before the run exists, and a
# stopped run cannot be resumed: it is TERMINATED.
NEVER_SHOWN = {RunStatus.BUILDING, RunStatus.UPLOADING, RunStatus.STOPPED}


@pytest.mark.parametrize(("name", "status"), SHOWN)
def test_a_recorded_reply_shows_the_status(name: str, status: RunStatus) -> None:
    body = recorded(f"runs_get_{name}")
    run = parse_run(body)
    assert run.status is status
    assert (run.raw_status, run.reason) == (body["status"], body["termination_reason"])
    assert run.is_active == (not status.is_finished)
    assert "Run: " + run.status == f"Run: {status.value}"


def test_each_documented_status_is_shown_or_known_not_to_be() -> None:
    assert {status for _, status in SHOWN} | NEVER_SHOWN == set(RunStatus)
    assert not {status for _, status in SHOWN} & NEVER_SHOWN


def test_waiting_for_capacity_does_not_count_as_a_restart() -> None:
    body = copy.deepcopy(recorded("runs_get_restarting_0.22.5"))
    for submission in (body["latest_job_submission"], body["jobs"][0]["job_submissions"][-1]):
        submission["termination_reason"] = "failed_to_start_due_to_no_capacity"
    assert parse_run(body).status is RunStatus.PENDING


def test_a_scheduled_run_that_waits_for_its_next_time_is_pending() -> None:
    body: dict[str, Any] = recorded("runs_get_restarting_0.22.5") | {
        "next_triggered_at": "2027-01-01T00:00:00Z"
    }
    assert parse_run(body).status is RunStatus.PENDING


def test_both_spellings_of_on_demand() -> None:
    assert {SpotPolicy.ON_DEMAN, SpotPolicy.ON_DEMAND} == {SpotPolicy("on-demand")}
    assert "policy: " + SpotPolicy.ON_DEMAND == "policy: on-demand"
