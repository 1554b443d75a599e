"""The attempts of a run, as its outcome lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstack_core._wire.http_messages import time_of
from dstack_core.models.run_attempt import RunAttempt

if TYPE_CHECKING:
    from dstack_core._wire.runs import Job, RunSnapshot, Submission

# Airflow and Prefect keep outcomes in their databases: an attempt takes some 250 bytes there.
_MOST_ATTEMPTS = 50


def attempts_of(run: RunSnapshot) -> tuple[RunAttempt, ...]:
    """Return the attempts that had a machine, oldest first; of very many the last ones."""
    found = [
        (one.attempt, job, one)
        for job in run.jobs
        for one in job.submissions
        if one.machine.instance is not None or one.machine.price is not None
    ]
    found.sort(key=lambda each: each[0])
    return tuple(_attempt(job, one) for _, job, one in found[-_MOST_ATTEMPTS:])


def _attempt(job: Job, one: Submission) -> RunAttempt:
    machine, seconds = one.machine, None
    if one.submitted_at and one.finished_at:
        seconds = (one.finished_at - time_of(one.submitted_at)).total_seconds()
    return RunAttempt(
        number=one.attempt + 1,
        reason=one.reason,
        exit_status=one.exit_status,
        # As the server computes the cost of a run.
        cost=round((seconds or 0.0) / 3600 * (machine.price or 0.0), 4),
        duration=seconds,
        instance=machine.instance,
        backend=machine.backend,
        region=machine.region,
        price_per_hour=machine.price,
        spot=machine.spot,
        node=job.node,
        replica=job.replica,
    )
