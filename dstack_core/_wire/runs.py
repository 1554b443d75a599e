"""Read the server's run objects (PROTOCOL 1.5) and sum up the outcome of a finished run.

Every field but id, status, name and time of submission is optional: servers from 0.18.44 to 0.22.5 differ in
what they send, and a newer one may add statuses and reasons, which are kept as they came. Types are checked
where they are read, so that a wrong one is a malformed reply and not an error somewhere later.

A run does not name the cause of its end; its jobs do, each with several attempts. ``outcome_of`` chooses the
job that explains it: the first that failed by itself, not those that were stopped with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from dstack_core._wire.cost_ends import at_cost_limit
from dstack_core._wire.exact_sizes import exact_sizes
from dstack_core._wire.hardware import read_hardware
from dstack_core._wire.http_messages import text, time_of
from dstack_core._wire.run_attempts import attempts_of
from dstack_core._wire.survival import loss_that_ended
from dstack_core._wire.waits import WaitsFor, names_in, waits_for
from dstack_core.models.cost_limits import CostLimit
from dstack_core.models.debug import HOLD_PREFIX
from dstack_core.models.failure_categories import describe_exit, find_category
from dstack_core.models.outcome import Outcome
from dstack_core.models.statuses import RunStatus, in_words, job_status, run_status
from dstack_core.models.utilization import Hardware

# The status message of a run, or of its job, while the image is pulled.
_PULLING = "pulling"


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a job; ``price`` in USD per hour. None is for what is not known (yet).

    ``spot``: whether it is a spot machine.
    """

    instance: str | None = None
    backend: str | None = None
    region: str | None = None
    price: float | None = None
    hardware: Hardware | None = None
    spot: bool | None = None


# Thousands of runs are watched in one process, mostly on equal machines, each of which is kept once.
_equal_machine = lru_cache(maxsize=512)(Machine)
# One object for all submissions without a machine: a process may watch thousands that wait for capacity.
_NO_MACHINE = Machine()
_NO_MACHINE_HAD = "failed_to_start_due_to_no_capacity"


@dataclass(frozen=True, slots=True)
class Submission:
    """One attempt of one job; its ``id`` is the key of its log."""

    id: str
    attempt: int
    status: str
    message: str | None
    reason: str | None
    reason_message: str | None
    exit_status: int | None
    finished_at: datetime | None
    machine: Machine
    deployment: int = 0
    submitted_at: str | None = None

    @property
    def mapped_status(self) -> RunStatus:
        """Return ``status``, the server's own word, as the table of statuses maps it."""
        return job_status(self.status)

    @property
    def may_have_logs(self) -> bool:
        """Return whether its container may have written something."""
        return not self.mapped_status.is_before_start

    @property
    def got_no_machine(self) -> bool:
        """Return whether it failed for lack of capacity: it never ran, so it has no log."""
        return self.reason == _NO_MACHINE_HAD and self.machine is _NO_MACHINE

    @property
    def is_finished(self) -> bool:
        """Return whether its log is complete (PROTOCOL 1.8: final lines come before the status)."""
        return self.mapped_status.is_finished


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a run: a replica of a service or a node of a task; `exact_sizes` if it got no machine."""

    replica: int
    node: int
    submissions: Sequence[Submission]
    exact_sizes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Service:
    """The addresses of a service; each may be relative to the server's (PROTOCOL 1.9)."""

    url: str
    model: str | None
    model_url: str | None


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run as the server showed it at one moment.

    ``raw_status`` and ``reason`` are the server's own words; ``marker`` is what the owner wrote into
    ``configuration_path`` (PROTOCOL 1.4). ``env`` stays out of the repr: its values may be secrets.
    ``hold_seconds`` is how long its container is held after its commands have failed; None: not at all.
    ``waits`` is what it waits for before its start. ``cost_limit`` is what it may cost.
    ``user`` is who submitted it. ``fleets`` are the names of those that it may use; none: any.
    ``has_pages``: the server's UI has a page for a run's log, and one for its metrics.
    """

    id: str
    name: str
    project: str
    status: RunStatus
    raw_status: str
    message: str | None
    reason: str | None
    error: str | None
    cost: float
    submitted_at: str
    marker: str | None
    deleted: bool
    jobs: Sequence[Job]
    service: Service | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    deployment: int = 0
    has_pages: bool = False
    waits: WaitsFor | None = None
    hold_seconds: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    cost_limit: CostLimit | None = None
    user: str = ""
    fleets: tuple[str, ...] = ()

    @property
    def is_active(self) -> bool:
        """Return whether the run has not ended yet."""
        return self.status.is_active

    @property
    def news(self) -> tuple[object, ...]:
        """Return what a follower would report: of two polls with equal news, the second reports nothing."""
        # The cost grows at every poll without being news, so it is not in it.
        submissions = [(each.id, each.status, each.message) for job in self.jobs for each in job.submissions]
        return (self.id, str(self.status), self.raw_status, self.message, self.deleted, *submissions)

    @property
    def runs_somewhere(self) -> bool:
        """Return whether a job of it is running; the run's own status may still be an earlier one."""
        return any(
            job.submissions and job.submissions[-1].mapped_status is RunStatus.RUNNING for job in self.jobs
        )

    @property
    def is_updating(self) -> bool:
        """Return whether a replica from before the latest update is still there."""
        latest = [job.submissions[-1] for job in self.jobs if job.submissions]
        return any(not each.is_finished and each.deployment < self.deployment for each in latest)


def parse_run(data: Mapping[str, Any]) -> RunSnapshot:
    """Read one run object."""
    jobs = tuple(_job(job) for job in data.get("jobs") or [])
    latest = _latest(data, jobs)
    spec = data.get("run_spec") or {}
    env = _env(spec)
    message = text(data.get("status_message"))
    is_pulling = latest is not None and latest.mapped_status is RunStatus.DOWNLOADING
    # The job's message is more precise than one that only repeats the run's status.
    if latest and (message is None or message == data["status"]):
        message = latest.message or (latest.status if is_pulling else message)
    status = run_status(
        str(data["status"]),
        message=_PULLING if is_pulling or (latest and latest.message == _PULLING) else message,
        reason=text(data.get("termination_reason")),
        restarting=_restarting(data, latest),
    )
    return RunSnapshot(
        id=str(data["id"]),
        name=str(spec["run_name"]),
        project=text(data.get("project_name")) or "",
        status=status,
        raw_status=str(data["status"]),
        message=message,
        reason=text(data.get("termination_reason")),
        error=text(data.get("error")) or None,
        cost=float(data.get("cost") or 0.0),
        submitted_at=_time(data["submitted_at"]),
        marker=text(spec.get("configuration_path")),
        deleted=bool(data.get("deleted")),
        jobs=jobs,
        service=_service(data.get("service")),
        env=env,
        deployment=int(data.get("deployment_num") or 0),
        # Servers send the key since 0.19.27, and have a page for a run's log and metrics since 0.19.25.
        has_pages="fleet" in data,
        waits=waits_for(data) if status.is_before_start else None,
        hold_seconds=_hold_seconds(spec),
        tags=_tags(spec),
        cost_limit=CostLimit.from_env(env) if env else None,
        user=text(data.get("user")) or "",
        fleets=tuple(names_in(spec, "fleets")),
    )


def outcome_of(run: RunSnapshot, url: str) -> Outcome:
    """Sum up a finished run; the job that failed speaks for all of them."""
    stopped_for = loss_that_ended(run)
    if stopped_for is None:
        status, submission = run.status, _explaining_submission(run)
        reason = _explaining_reason(run, submission)
    else:
        status, submission = RunStatus.FAILED, stopped_for[0]
        reason = submission.reason
    machine = submission.machine if submission else _NO_MACHINE
    category = "" if status.is_success else _category(submission, reason)
    # Servers send no time at which the run ended: it is that of its last job.
    ends = [last.finished_at for job in run.jobs for last in job.submissions if last.finished_at]
    outcome = Outcome(
        run_name=run.name,
        run_id=run.id,
        project=run.project,
        status=status,
        exit_status=submission.exit_status if submission else None,
        reason=reason,
        message=_message(run, submission, reason, stopped_for[1] if stopped_for else None),
        cost=run.cost,
        duration=(max(ends) - time_of(run.submitted_at)).total_seconds() if ends else None,
        instance=machine.instance,
        backend=machine.backend,
        region=machine.region,
        price_per_hour=machine.price,
        url=url,
        category=category,
        attempts=attempts_of(run),
    )
    return outcome if run.cost_limit is None else at_cost_limit(outcome, run.cost_limit)


def _time(value: Any) -> str:
    """Return a time as it came, for paging; raises ``ValueError`` or ``TypeError`` for anything else."""
    time_of(value)
    return str(value)


def _tags(spec: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the tags of a run spec; a server has those of a profile only there, and none before 0.19.5."""
    for part in ("configuration", "profile"):
        tags = (spec.get(part) or {}).get("tags")
        if isinstance(tags, Mapping):
            return {str(key): str(value) for key, value in tags.items()}
    return {}


def _env(spec: Mapping[str, Any]) -> Mapping[str, str]:
    env = (spec.get("configuration") or {}).get("env")
    return {name: str(value) for name, value in env.items()} if isinstance(env, Mapping) else {}


def _hold_seconds(spec: Mapping[str, Any]) -> int | None:
    commands = (spec.get("configuration") or {}).get("commands")
    # At most the command of the reports comes before it.
    for command in commands[:2] if isinstance(commands, list) else ():
        if isinstance(command, str) and command.startswith(HOLD_PREFIX):
            # Earlier versions wrote a line end behind it.
            digits = re.match(r"\d+(?=[;\n])", command.removeprefix(HOLD_PREFIX))
            return None if digits is None else int(digits[0])
    return None


def _job(data: Mapping[str, Any]) -> Job:
    spec = data.get("job_spec") or {}
    submissions = tuple(_submission(item) for item in data.get("job_submissions") or [])
    return Job(
        replica=int(spec.get("replica_num") or 0),
        node=int(spec.get("job_num") or 0),
        submissions=submissions,
        # Read only where it matters: a run is polled many times.
        exact_sizes=exact_sizes(spec) if any(one.reason == _NO_MACHINE_HAD for one in submissions) else (),
    )


def _submission(data: Mapping[str, Any]) -> Submission:
    finished_at, exit_status = data.get("finished_at"), data.get("exit_status")
    return Submission(
        id=str(data["id"]),
        attempt=int(data.get("submission_num") or 0),
        status=str(data["status"]),
        message=text(data.get("status_message")),
        reason=text(data.get("termination_reason")),
        reason_message=text(data.get("termination_reason_message")) or None,
        exit_status=None if exit_status is None else int(exit_status),
        finished_at=time_of(finished_at) if finished_at else None,
        machine=_machine(data.get("job_provisioning_data"), data.get("job_runtime_data")),
        deployment=int(data.get("deployment_num") or 0),
        submitted_at=text(data.get("submitted_at")),
    )


def _machine(data: Mapping[str, Any] | None, runtime: Any) -> Machine:
    if not data:
        return _NO_MACHINE
    kind, price = data.get("instance_type"), data.get("price")
    resources = _resources(kind, runtime)
    spot = None if resources is None else resources.get("spot")
    return _equal_machine(
        text(kind.get("name")) if isinstance(kind, Mapping) else None,
        text(data.get("backend")),
        text(data.get("region")),
        float(price) if isinstance(price, int | float) else None,
        None if resources is None else read_hardware(resources),
        spot if isinstance(spot, bool) else None,
    )


def _resources(kind: Any, runtime: Any) -> Mapping[str, Any] | None:
    # A job may have a part of a machine only; then its own offer has the part (PROTOCOL 1.5).
    for part in (runtime, "offer", "instance"), (kind,):
        found: Any = part[0]
        for key in (*part[1:], "resources"):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return None


def _restarting(data: Mapping[str, Any], latest: Submission | None) -> bool:
    """Return whether a job is tried again; waiting for capacity or for a schedule does not count."""
    if latest is None or (
        RunStatus(str(data["status"])) is RunStatus.PENDING and data.get("next_triggered_at")
    ):
        return False
    return latest.attempt > 0 or latest.reason not in (None, "failed_to_start_due_to_no_capacity")


def _service(data: Mapping[str, Any] | None) -> Service | None:
    if not data:
        return None
    model = data.get("model") or {}
    return Service(str(data["url"]), text(model.get("name")), text(model.get("base_url")))


def _latest(data: Mapping[str, Any], jobs: Sequence[Job]) -> Submission | None:
    written = data.get("latest_job_submission")
    if written:
        # It is mostly one that was just read. Thousands of watched runs are read at every poll, so it is not
        # read twice.
        last = jobs[0].submissions[-1] if jobs and jobs[0].submissions else None
        return last if last and data["jobs"][0]["job_submissions"][-1] == written else _submission(written)
    return jobs[0].submissions[-1] if jobs and jobs[0].submissions else None


def _explaining_submission(run: RunSnapshot) -> Submission | None:
    """Choose the job that explains the end: the first that failed by itself, else the first."""
    # A job that passed a limit ends as terminated, although that fails the run (PROTOCOL 1.6).
    last = [job.submissions[-1] for job in run.jobs if job.submissions]
    failed = [
        item
        for item in last
        if item.mapped_status is RunStatus.FAILED or _category(item, item.reason).startswith("limit.")
    ]
    return next(iter(failed + last), None)


def _explaining_reason(run: RunSnapshot, submission: Submission | None) -> str | None:
    """Prefer the job's reason where the run's only states that a job failed."""
    if run.reason in (None, "job_failed", "retry_limit_exceeded") and submission and submission.reason:
        return submission.reason
    return run.reason


def _category(submission: Submission | None, reason: str | None) -> str:
    if submission is None:
        return find_category(reason).name
    text_of_job = submission.reason_message or ""
    return find_category(reason, submission.exit_status, text_of_job, spot=submission.machine.spot).name


def _message(
    run: RunSnapshot, submission: Submission | None, reason: str | None, limit: str | None = None
) -> str:
    words = in_words(reason) or str(run.status)
    if submission and reason == "container_exited_with_error" and submission.exit_status is not None:
        words = describe_exit(submission.exit_status)
    parts = [submission.reason_message if submission else None]
    # The reason is the last attempt's, so the limit that ended the attempts is added here.
    if run.reason == "retry_limit_exceeded":
        parts.append("the time limit for retries passed")
    parts.append(limit)
    details = "; ".join(" ".join(part.split()).rstrip(".") for part in parts if part)
    sentences = [f"{words} ({details})" if details else words]
    if reason == _NO_MACHINE_HAD:
        hints = dict.fromkeys(hint for job in run.jobs for hint in job.exact_sizes)
        sentences += [hint.rstrip(".") for hint in hints if hint.rstrip(".") not in details]
    # Without the last full stop: callers put it into longer sentences.
    return ". ".join(sentences)
