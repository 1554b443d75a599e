"""Check the arguments, name the run and find its owner; no request is made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger

from prefect_dstack._job import Job
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET, Relay
from prefect_dstack._names import Owner, identify, outlives_crash, task_owner
from prefect_dstack._probe import CancelProbe, current_task_runner
from prefect_dstack._report import Report

if TYPE_CHECKING:
    from prefect_dstack._submission import Submission

OnCrash = Literal["stop", "keep"]
RunLike = str | Mapping[str, Any]
"""The name of a run, or what ``submit_run`` or ``get_run`` returned."""


def prepare(
    submission: Submission,
    *,
    run_name: str | None,
    on_crash: str,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    artifacts: bool = False,
    owner: Owner | None = None,
    logger: Any = None,
) -> Job:
    """Return the job that submits what ``submission`` describes.

    ``owner`` and ``logger`` default to the current task's. Raises ``ConfigurationError``.
    """
    from dstack_core.integration import Attempt

    check_pace(poll_interval, retry_budget)
    check_log_budget(log_budget_bytes)
    _check("on_crash", on_crash, on_crash in ("stop", "keep"), '"stop" or "keep"')
    owner = owner or task_owner()
    logger = logger or get_run_logger()
    prefix = submission.configuration.name
    names = identify(owner, submission.described, on_crash=on_crash, run_name=run_name, prefix=prefix)
    relay = Relay(logger, stream_logs=stream_logs, log_budget_bytes=log_budget_bytes)
    relay.masker.add(submission.secrets)
    for warning in submission.warnings:
        logger.warning(warning)
    return Job(
        spec={"configuration": submission.configuration, **submission.arguments},
        names=names,
        attempt=Attempt(names.ref(1)),
        relay=relay,
        report=_report(prefix or run_name, logger, artifacts and owner.is_tracked),
        probe=CancelProbe(owner.flow_run_id, current_task_runner()),
        logger=logger,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        keeps_on_crash=on_crash == "keep",
        flow_run_id=owner.flow_run_id,
        code=submission.code,
    )


def prepare_to_watch(
    run: RunLike,
    *,
    poll_interval: float,
    retry_budget: float,
    stream_logs: bool,
    log_budget_bytes: int | None,
    artifacts: bool,
    owner: Owner,
    logger: Any,
) -> Job:
    """Return the job that follows an existing run; it does not own the run until ``own`` is called."""
    from dstack_core.integration import Attempt, AttemptNames, RunRef

    check_pace(poll_interval, retry_budget)
    check_log_budget(log_budget_bytes)
    name = name_of(run)
    return Job(
        spec={},
        names=AttemptNames(name, "", name),
        attempt=Attempt(RunRef(name, ""), run_id=run.get("run_id") if isinstance(run, Mapping) else None),
        relay=Relay(logger, stream_logs=stream_logs, log_budget_bytes=log_budget_bytes),
        report=_report(name, logger, artifacts and owner.is_tracked),
        probe=CancelProbe(owner.flow_run_id, current_task_runner()),
        logger=logger,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        keeps_on_crash=False,
        is_owned=False,
    )


def own(job: Job, marker: str | None, prefix: str = "prefect:") -> None:
    """Stop the job's run with its execution if its ``marker`` begins with ``prefix``."""
    job.is_owned = (marker or "").startswith(prefix)
    if job.is_owned and marker:
        from dstack_core.integration import RunRef

        job.attempt.ref = RunRef(job.attempt.ref.name, marker)
        job.keeps_on_crash = outlives_crash(marker)


def name_of(run: RunLike) -> str:
    """Return the run's name. Raises ``ConfigurationError`` where there is none."""
    name = run.get("run_name") if isinstance(run, Mapping) else run
    if not isinstance(name, str) or not name:
        refuse(f"run: expected a run's name, or what submit_run or get_run returned, got {run!r}.")
    return name


def check_pace(poll_interval: float, retry_budget: float) -> None:
    """Raise ``ConfigurationError`` for values out of range."""
    _check("poll_interval", poll_interval, poll_interval > 0, "more than 0 seconds")
    _check("retry_budget", retry_budget, retry_budget >= 0, "0 seconds or more")


def check_log_budget(value: object) -> None:
    """Raise ``ConfigurationError`` for what is not a number of bytes."""
    is_fine = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    _check("log_budget_bytes", value, is_fine, "bytes of log, 0 or more, or None for all of it")


def _report(name: str | None, logger: Any, artifacts: bool) -> Report:
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    task_run_id = None if task is None else task.task_run.id
    flow_run_id = None if task is None else task.task_run.flow_run_id
    if flow_run_id is None and flow is not None and flow.flow_run is not None:
        flow_run_id = flow.flow_run.id
    return Report(name, logger, artifacts=artifacts, flow_run_id=flow_run_id, task_run_id=task_run_id)


def _check(name: str, value: object, is_fine: bool, wanted: str) -> None:
    if not is_fine:
        refuse(f"{name}: expected {wanted}, got {value!r}.")


def refuse(message: str) -> NoReturn:
    """Raise ``ConfigurationError``."""
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
