"""Read how busy the machine of a followed run was, in as few requests as are right.

The problem: a server measures every ten seconds, and drops what is older than an hour while the job runs (a
finished job's last hour stays for days; PROTOCOL 1.9). A follower wants the whole run.

The idea: one request for each job when the run has ended, which is enough for an hour. A longer run is also
read every 45 minutes, only what is new, and each time summed up into ``Progress``, so that a process that
takes over continues it. A server returns the values of a job's last attempt only (PROTOCOL 1.9), so those of
an attempt that the server is going to repeat are read before the next one begins. A run of less than 10
seconds has no values and costs no request.

Invariants: nothing here fails or delays a follower for long. Each request is sent once, with a short limit,
and what a server refuses or does not have is missing in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from dstack_core._flow.queries import MOST_VALUES
from dstack_core._flow.steps import Op, call
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Call, time_of
from dstack_core._wire.runs import Machine, RunSnapshot
from dstack_core.errors import DstackError
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from dstack_core.models.records import Metric
from dstack_core.models.statuses import RunStatus
from dstack_core.models.utilization import (
    Hardware,
    RunMetrics,
    Utilization,
    UtilizationSoFar,
    utilization_of,
)

# Servers keep the values of a running job for an hour by default and delete every five minutes. The rest is
# for a follower that is late.
_SAMPLE_SECONDS = 45 * 60.0
# A server needs two values, ten seconds apart, so that most runs of less than 20 seconds have none either.
_SHORTEST_RUN = 10.0
# The clocks of the server and of this machine may differ by some seconds: in less, an ended attempt is not
# read again.
_LEAST_PAUSE = 60.0
# Nodes and replicas whose values are read: each is a request, and they do the same work.
_MOST_JOBS = 8
_REQUEST_SECONDS = 10.0
# Less shows little of the next run: a training may still have been loading its data.
_ADVICE_AFTER = 600.0
# A saving that is worth another GPU. Prices of offers change by the hour.
_LEAST_SAVING = 0.3
# Of its memory. Above it, no smaller GPU with the headroom exists in practice, and no request is made.
_MOST_USED = 0.6
_UNAVAILABLE = ("not_available", "no_quota", "no_balance")


def machine_of(run: RunSnapshot) -> Machine | None:
    """Return the machine of the run's first job that has one."""
    found = (each.machine for job in run.jobs for each in reversed(job.submissions))
    return next((machine for machine in found if machine.hardware is not None), None)


def hardware_of(run: RunSnapshot) -> Hardware:
    """Return what a job of the run has of its machine; an empty one before it has a machine."""
    machine = machine_of(run)
    return (None if machine is None else machine.hardware) or Hardware()


def jobs_of(run: RunSnapshot) -> list[tuple[int, int]]:
    """Return ``(replica, node)`` of the run's jobs."""
    return [(job.replica, job.node) for job in run.jobs] or [(0, 0)]


def is_sample_due(run: RunSnapshot, progress: Progress, now: float) -> bool:
    """Return whether values of an active run would soon be lost: by their age, or by its next attempt."""
    so_far = progress.utilization
    since = time_of(run.submitted_at).timestamp() if so_far is None else so_far.sampled_at
    if run.status is RunStatus.RUNNING:
        return now - since >= _SAMPLE_SECONDS
    # A run that is terminating has no next attempt; its values are read once it has ended.
    if run.status.is_ending or (so_far is not None and now - since < _LEAST_PAUSE):
        return False
    latest = [job.submissions[-1] for job in run.jobs if job.submissions]
    ends = [each.finished_at.timestamp() for each in latest if each.is_finished and each.finished_at]
    # Without a machine it did not run.
    return machine_of(run) is not None and any(end - since >= _SHORTEST_RUN for end in ends)


def sample(api: Api, run: RunSnapshot, progress: Progress, now: float) -> Op[Progress]:
    """Add what was measured since the last time to the progress."""
    so_far = progress.utilization or UtilizationSoFar(now)
    until = dict(so_far.until)
    series: list[Metric] = []
    for replica, node in jobs_of(run)[:_MOST_JOBS]:
        last = until.get(f"{replica}.{node}")
        after = None if last is None else datetime.fromtimestamp(last, UTC)
        request = api.get_metrics(
            run.name, run.id, node=node, replica=replica, limit=MOST_VALUES, after=after
        )
        found = yield from _attempt(request)
        newest = max((metric.timestamps[-1] for metric in found if metric.timestamps), default=None)
        if newest is not None:
            until[f"{replica}.{node}"] = newest.timestamp()
        series += found
    new = utilization_of(series, hardware_of(run))
    summary = new if so_far.summary is None else so_far.summary.merged(new)
    return replace(progress, utilization=UtilizationSoFar(now, until, summary))


def with_utilization(
    api: Api, run: RunSnapshot, progress: Progress, outcome: Outcome, now: float
) -> Op[Outcome]:
    """Return the outcome of a finished run with its utilization, as far as the server has it."""
    if outcome.duration is not None and outcome.duration < _SHORTEST_RUN:
        return outcome
    if machine_of(run) is None:
        return outcome
    measured = (yield from sample(api, run, progress, now)).utilization
    usage = None if measured is None else measured.summary
    if usage is None:
        return outcome
    return replace(outcome, utilization=(yield from _advised(api, run, usage)))


def _attempt(request: Call[list[Metric]]) -> Op[Sequence[Metric]]:
    """Send a request once and within its time; return nothing for an error."""
    try:
        return (yield from call(replace(request.within(_REQUEST_SECONDS), idempotent=False)))
    except DstackError:
        return ()


def _advised(api: Api, run: RunSnapshot, usage: Utilization) -> Op[Utilization]:
    """Add a sentence on a smaller GPU if today's offers have one that saves enough."""
    machine, peak, total = machine_of(run), usage.gpu_memory_peak, usage.gpu_memory_total
    price = None if machine is None else machine.price
    if usage.seconds < _ADVICE_AFTER or not price or not peak or not total or peak > _MOST_USED * total:
        return usage
    try:
        request = api.get_usage_spec(run.name, run.id, usage)
        smaller = yield from call(replace(request.within(_REQUEST_SECONDS), idempotent=False))
        if smaller is None:
            return usage
        plan_request = api.get_plan(smaller.run_spec).within(_REQUEST_SECONDS)
        plan = yield from call(replace(plan_request, idempotent=False))
    except DstackError:
        return usage
    offers = [offer for offer in plan.offers if offer.availability not in _UNAVAILABLE and offer.gpu_memory]
    cheapest = min(offers, key=lambda offer: offer.price_per_hour, default=None)
    if cheapest is None or cheapest.price_per_hour > price * (1 - _LEAST_SAVING):
        return usage
    return usage.with_advice(cheapest, price)


def read_metrics(
    api: Api, run: RunSnapshot, *, node: int | None, replica: int | None, limit: int
) -> Op[RunMetrics]:
    """Read the series of all jobs of a run, or of those with that node and replica.

    A run that had no machine when it was last polled is fetched first. Raises ``RunNotFoundError`` for a job
    that the run does not have.
    """
    if machine_of(run) is None:
        run = (yield from call(api.get_run(run.name, run.id))) or run
    jobs = [job for job in jobs_of(run) if replica in (None, job[0]) and node in (None, job[1])] or [
        (replica or 0, node or 0)
    ]
    series: list[Metric] = []
    for each_replica, each_node in jobs:
        series += yield from call(
            api.get_metrics(run.name, run.id, node=each_node, replica=each_replica, limit=limit)
        )
    return RunMetrics(run.name, tuple(series), hardware_of(run))
