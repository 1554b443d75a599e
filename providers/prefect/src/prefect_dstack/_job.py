"""One execution of a task: checked and named before any request, then what sync and async code share of it.

``prepare`` and ``prepare_to_watch`` make a ``Job`` and are the last place that refuses an argument.
``_follow`` runs it and ``_stop`` ends it; both change ``attempt``, ``page`` and ``stopped``, which hold at
any moment what is known of the run, because an interrupt may come between any two statements.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger

from prefect_dstack import _log_relay
from prefect_dstack._callbacks import new_notifier
from prefect_dstack._cancellation import SLICE_SECONDS, CancelProbe, StopRequested, current_task_runner
from prefect_dstack._checks import check_log_budget, check_on_crash, check_pace, check_switches
from prefect_dstack._current_secrets import values_behind
from prefect_dstack._followers import Heartbeat
from prefect_dstack._live_artifacts import LiveArtifacts
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET, Relay, client_warnings_in
from prefect_dstack._names import Owner, identify, outlives_crash, task_owner
from prefect_dstack._report import Report
from prefect_dstack._secrets import Masking, git_credentials_named, shown_env
from prefect_dstack._submission import Code

if TYPE_CHECKING:
    from uuid import UUID

    from dstack_core import (
        AsyncClient,
        AsyncRun,
        CallbacksLike,
        Client,
        Event,
        OutcomeDict,
        ReportLimits,
        Run,
    )
    from dstack_core.integration import Attempt, AttemptNames, CallbackNotifier, Fallbacks, RunRef, StopResult
    from prefect_dstack._fallback_steps import JobSteps
    from prefect_dstack._function_result import FunctionResult
    from prefect_dstack._submission import Submission

RunT = TypeVar("RunT", "Run", "AsyncRun")
OnCrash = Literal["stop", "keep"]
RunLike = str | Mapping[str, Any]
"""The name of a run, or what ``submit_run`` or ``get_run`` returned."""


@dataclass(slots=True)
class Job:
    """One execution: what to submit, under which name, and where it is shown.

    ``names`` are those of all its attempts, ``attempt`` is the one that is meant at any moment.
    ``is_owned`` (bool): the run is stopped when its execution ends early. ``flow_run_id`` (str) and
    ``task_run_id`` (UUID) are the flow run and the task run in whose logs the run's log is. ``page``
    (str) is where a person finds the run. ``stopped`` is what is known after a stop, None before.
    ``code`` is what the client that submits is made with. ``function`` is the call that the run makes,
    None for a plain configuration. ``masking`` is the rule for the run's environment. ``notifier`` calls
    the callbacks. ``fallbacks`` are what later runs are submitted with, and ``steps`` are these; both None
    for a job with one run.
    """

    # Empty for a run that exists already.
    spec: dict[str, Any]
    names: AttemptNames
    attempt: Attempt
    relay: Relay
    report: Report
    live: LiveArtifacts
    probe: CancelProbe
    heartbeat: Heartbeat
    logger: Any
    poll_interval: float
    retry_budget: float
    keeps_on_crash: bool
    log_timestamps: bool = False
    is_owned: bool = True
    flow_run_id: str | None = None
    task_run_id: UUID | None = None
    page: str = ""
    stopped: StopResult | None = None
    code: Code = field(default_factory=Code)
    function: FunctionResult | None = None
    notifier: CallbackNotifier | None = None
    masking: Masking = field(default_factory=Masking)
    fallbacks: Fallbacks | None = None
    steps: JobSteps | None = None
    # The run's environment and tags for a person, without its secrets.
    shown_env: str = ""
    shown_tags: str = ""

    @property
    def report_limits(self) -> ReportLimits | None:
        """The limits on what the run reports; None for those of the client."""
        return None if self.function is None else self.function.limits

    @property
    def may_exist(self) -> bool:
        """Whether there may be a run: not before the submission, unless an earlier execution left one."""
        attempt = self.attempt
        return attempt.run_id is not None or attempt.may_appear or not attempt.is_chosen

    def sleep(self, seconds: float) -> None:
        """Wait in short slices; raises ``StopRequested`` when the flow run was cancelled meanwhile.

        What the run has reported is shown here: after all that a poll returned, and while it is silent.
        """
        from dstack_core import clock

        def after_slice() -> None:
            # Also for no time at all: that is how long the first retry of a slow request waits.
            if self.probe.is_due and (request := self.ask()) is not None:
                raise request
            if self.live.is_due:
                self.live.write()

        clock.sleep_in_slices(seconds, SLICE_SECONDS, after_slice)

    async def asleep(self, seconds: float) -> None:
        """Wait in short slices: the twin of ``sleep``."""
        from dstack_core import clock

        async def after_slice() -> None:
            if self.probe.is_due and (request := await asyncio.to_thread(self.ask)) is not None:
                raise request
            if self.live.is_due:
                await asyncio.to_thread(self.live.write)

        await clock.asleep_in_slices(seconds, SLICE_SECONDS, after_slice)

    def ask(self) -> StopRequested | None:
        """Return why to stop, or None; a run that outlasts its flow run is shown to have a follower."""
        request = self.probe.ask()
        if request is None and self.probe.has_ended and self.attempt.run_id is not None:
            self.heartbeat.emit(self.attempt.run_id)
        return request

    def check_flow_run(self) -> None:
        """Raise ``StopRequested`` when the flow run no longer needs a run; asks the Prefect server once.

        A freed worker of Dask or Ray starts the next task of a cancelled flow run, which must not pay for a
        machine.
        """
        if (request := self.probe.ask_before_submit()) is not None:
            raise request

    def submission(self) -> dict[str, Any]:
        """Return the arguments of ``client.runs.submit``."""
        ref = self.attempt.ref
        # A worker never attaches: whether a local port of its machine is free does not matter.
        fixed = {"verify_ports": False, "retry_budget": self.retry_budget}
        step = {} if self.steps is None else self.steps.options
        return {**self.spec, **step, "run_name": ref.name, "marker": ref.marker, **fixed}

    @contextmanager
    def packed(self) -> Iterator[dict[str, Any]]:
        """Provide the arguments of ``client.runs.submit``, and the files of a call while it is submitted."""
        arguments = self.submission()
        arguments["env"] = _with_trace(arguments.get("env"), arguments["configuration"])
        if self.function is None:
            yield arguments
        else:
            with self.function.files(self.attempt.ref.marker, arguments["configuration"]) as configuration:
                yield {**arguments, "configuration": configuration}

    @contextmanager
    def submitting(self) -> Iterator[None]:
        """Add to an error of the submission that there may be a run."""
        from dstack_core import ServerUnreachableError

        # Set before the request: an interrupt may come while the server creates the run.
        self.attempt.may_appear = True
        try:
            with git_credentials_named(), client_warnings_in(self.logger):
                yield
        except ServerUnreachableError as error:
            raise ServerUnreachableError(
                f"{error.message.rstrip('.')}. Run {self.attempt.ref.name} may have been submitted. "
                f"Check the list of runs, and stop it there: {self.page}"
            ) from error

    def check_steps(self, client: Client | AsyncClient) -> None:
        """Check what every step is submitted with; makes no request."""
        if self.fallbacks is not None:
            from prefect_dstack._fallback_steps import JobSteps

            self.steps = JobSteps(self, client, self.fallbacks)

    def noted(self, run: RunT, project: str) -> RunT:
        """Call the callbacks for a run that was submitted just now, or by an earlier execution; return it."""
        self.note(run)
        if self.notifier is not None:
            self.notifier.submitted(run, project, is_taken_over=self.attempt.is_adopted)
        return run

    def note_found(self, run: Run | AsyncRun | None, project: str) -> None:
        """Note which run the callbacks are called for, if it is only followed."""
        if run is not None and self.notifier is not None:
            self.notifier.follows(run, project)

    def pauses(self) -> Iterator[float]:
        """Yield how long to sleep until the callbacks have returned."""
        return iter(()) if self.notifier is None else self.notifier.pauses()

    def note(self, run: Run | AsyncRun) -> None:
        """Remember which run it is, so that an interrupted task stops the right one."""
        self.attempt.may_appear = False
        self.attempt.run_id = run.id
        self.page = run.url
        self.relay.note_page(run.url)

    def hide_env(self, run: Run | AsyncRun) -> None:
        """Mask the secrets in the environment of the run, which the server returns.

        Those of a run that was adopted may have been others.
        """
        self.relay.masker.add([*self.masking.secrets_in(run.env), *values_behind(run.env)])
        self.shown_env = shown_env(run.env, self.relay.masker.mask)
        # Prefect cuts a long cell: the user's own come first.
        tags = dict(sorted(run.tags.items(), key=lambda tag: tag[0].startswith("prefect-")))
        self.shown_tags = shown_env(tags, self.relay.masker.mask)

    def log_start(self, run: Run | AsyncRun) -> None:
        """Log which run this is, and whether an earlier execution submitted it.

        What an adopted run's log has here already is not relayed again; the Prefect server is asked for it.
        """
        self.note(run)
        self.logger.info("%s", _log_relay.start_record(run))
        if self.attempt.is_adopted:
            self.relay.take_over(run, self.flow_run_id, self.task_run_id)

    def handle(self, event: Event) -> None:
        """Log one event and remember what the run has reported; makes no request."""
        if self.steps is not None:
            of_job = self.steps.take(event)
            if of_job is None:
                return
            event = of_job
        self.show(event)

    def show(self, event: Event) -> None:
        """Log and remember an event of the whole job."""
        self.relay.handle(event)
        self.live.take(event)
        self.report.announce(event)
        if self.function is not None:
            self.function.take(event)
        if self.notifier is not None:
            self.notifier.handle(event)

    def report_end(self) -> None:
        """Log the end of the run and show it in Prefect, and all that it has reported."""
        self.relay.log_end()
        more = {
            "Tags": self.shown_tags,
            "Environment": self.shown_env,
            "Checkpoint": self.live.checkpoint,
            "Skipped": self.live.skipped,
        }
        self.report.end(self.relay.outcome, may_be_known=self.attempt.is_adopted, more=more)
        _trace(self.relay, self.logger)
        self.live.write(everything=True)

    def result(self) -> OutcomeDict:
        """Return the outcome as JSON-plain values, or raise what the run's failure is."""
        from dstack_core.integration import outcome_dict, raise_for_outcome

        outcome = self.relay.outcome
        if outcome is None:
            raise RuntimeError(f"following run {self.attempt.ref.name} ended without an outcome")
        # An error that advises a retry names the option, which only a task that submits has.
        raise_for_outcome(
            outcome,
            list(self.relay.tail),
            retry_option="retry_policy" if self.spec else None,
            are_shown=self.relay.shows_tail,
        )
        skipped = self.live.skipped
        if skipped is not None:
            self.logger.info("Run %s was skipped: %s", outcome.run_name, skipped)
        # No state of its own: a task that is called directly would return Prefect's state, not the outcome.
        return outcome_dict(outcome) if skipped is None else {**outcome_dict(outcome), "skipped": skipped}


def prepare(
    submission: Submission,
    *,
    run_name: str | None,
    on_crash: str,
    poll_interval: float = 5.0,
    retry_budget: float = 600.0,
    stream_logs: bool = True,
    log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
    log_timestamps: bool = False,
    artifacts: bool = False,
    callbacks: CallbacksLike = None,
    owner: Owner | None = None,
    logger: Any = None,
) -> Job:
    """Return the job that submits what ``submission`` describes.

    Args:
        submission: What to submit, checked.
        run_name: The run's name; None makes one from the flow run.
        on_crash: ``"stop"`` or ``"keep"``, stored in the marker.
        poll_interval: Seconds between two status requests.
        retry_budget: Seconds to keep retrying an unreachable server.
        stream_logs: Relay the log lines.
        log_budget_bytes: Bytes of log to relay at most; None for all.
        log_timestamps: Begin each line with its time.
        artifacts: Show the run in the artifacts of its flow run.
        callbacks: What is called while the run is followed.
        owner: Who runs it; by default the current task.
        logger: Where its log goes; by default the current task's.

    Returns:
        The job; no request has been made.

    Raises:
        ConfigurationError: A value is out of range.
    """
    from dstack_core.integration import Attempt

    check_pace(poll_interval, retry_budget)
    check_log_budget(log_budget_bytes)
    check_switches(stream_logs=stream_logs, log_timestamps=log_timestamps, artifacts=artifacts)
    check_on_crash(on_crash)
    owner = owner or task_owner()
    logger = logger or get_run_logger()
    task = TaskRunContext.get()
    prefix = submission.configuration.name
    names = identify(owner, submission.described, on_crash=on_crash, run_name=run_name, prefix=prefix)
    relay = Relay(logger, stream_logs=stream_logs, log_budget_bytes=log_budget_bytes)
    # Before the first line is logged: the client warns while it submits.
    relay.masker.add(submission.secrets)
    for warning in submission.warnings:
        logger.warning(warning)
    report, live = _artifacts(prefix or run_name, logger, relay, artifacts and owner.is_tracked)
    return Job(
        spec={"configuration": submission.configuration, **submission.arguments},
        names=names,
        attempt=Attempt(names.ref(1)),
        relay=relay,
        report=report,
        live=live,
        probe=CancelProbe(owner.flow_run_id, current_task_runner()),
        heartbeat=Heartbeat(logger),
        logger=logger,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        log_timestamps=log_timestamps,
        keeps_on_crash=on_crash == "keep",
        flow_run_id=owner.flow_run_id,
        task_run_id=None if task is None else task.task_run.id,
        code=submission.code,
        notifier=new_notifier(callbacks, relay, logger),
        masking=submission.masking,
        fallbacks=submission.fallbacks,
    )


def prepare_to_watch(
    run: RunLike,
    *,
    poll_interval: float,
    retry_budget: float,
    stream_logs: bool,
    log_budget_bytes: int | None,
    log_timestamps: bool = False,
    artifacts: bool,
    owner: Owner,
    logger: Any,
    callbacks: CallbacksLike = None,
    masking: Masking | None = None,
) -> Job:
    """Return the job that follows an existing run; it does not own the run until ``own`` is called."""
    from dstack_core.integration import Attempt, AttemptNames, RunRef

    check_pace(poll_interval, retry_budget)
    check_log_budget(log_budget_bytes)
    check_switches(stream_logs=stream_logs, log_timestamps=log_timestamps, artifacts=artifacts)
    name = name_of(run)
    relay = Relay(logger, stream_logs=stream_logs, log_budget_bytes=log_budget_bytes)
    report, live = _artifacts(name, logger, relay, artifacts and owner.is_tracked)
    return Job(
        spec={},
        names=AttemptNames(name, "", name),
        attempt=Attempt(RunRef(name, ""), run_id=run.get("run_id") if isinstance(run, Mapping) else None),
        relay=relay,
        report=report,
        live=live,
        probe=CancelProbe(owner.flow_run_id, current_task_runner()),
        heartbeat=Heartbeat(logger),
        logger=logger,
        poll_interval=poll_interval,
        retry_budget=retry_budget,
        log_timestamps=log_timestamps,
        # Until the marker of the run is known, it may be another flow run's.
        keeps_on_crash=False,
        is_owned=False,
        notifier=new_notifier(callbacks, relay, logger),
        masking=masking or Masking(),
    )


def allow_steps(job: Job, submission: Submission, first: RunRef) -> None:
    """Let a job that follows an existing run submit its further steps; ``first`` is step 1."""
    job.spec = {"configuration": submission.configuration, **submission.arguments}
    job.code, job.fallbacks = submission.code, submission.fallbacks
    job.attempt.first = first
    job.relay.masker.add(submission.secrets)


def own(job: Job, marker: str | None, prefix: str = "prefect:") -> None:
    """Stop the job's run with its execution if its ``marker`` begins with ``prefix``."""
    job.is_owned = (marker or "").startswith(prefix)
    if job.is_owned and marker:
        from dstack_core.integration import RunRef

        job.attempt.ref = RunRef(job.attempt.ref.name, marker)
        job.keeps_on_crash = outlives_crash(marker)


def name_of(run: RunLike) -> str:
    """Return the run's name. Raises ``ConfigurationError`` if it is missing."""
    name = run.get("run_name") if isinstance(run, Mapping) else run
    if not isinstance(name, str) or not name:
        refuse(f"run: expected a run's name, or what submit_run or get_run returned, got {run!r}.")
    return name


def _artifacts(name: str | None, logger: Any, relay: Relay, artifacts: bool) -> tuple[Report, LiveArtifacts]:
    """Return what shows the run itself, and what shows its reports, as artifacts of the current task."""
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    task_run_id = None if task is None else task.task_run.id
    flow_run_id = None if task is None else task.task_run.flow_run_id
    if flow_run_id is None and flow is not None and flow.flow_run is not None:
        flow_run_id = flow.flow_run.id
    shown: dict[str, Any] = {
        "artifacts": artifacts,
        "flow_run_id": flow_run_id,
        "task_run_id": task_run_id,
    }
    return Report(name, logger, **shown), LiveArtifacts(logger, relay.masker.mask, **shown)


def _with_trace(env: Mapping[str, str] | None, configuration: Any) -> Mapping[str, str] | None:
    """Return ``env`` with the trace that the task is in, if Prefect or the flow traces."""
    from dstack_core.integration import trace_env

    own = {item.partition("=")[0] for item in configuration.env or ()}
    added = {name: value for name, value in trace_env().items() if name not in own}
    return {**added, **(env or {})} if added else env


def _trace(relay: Relay, logger: Any) -> None:
    """Add the run that has ended to the task's trace; what tracing raises is logged."""
    from dstack_core.integration import trace_run

    if relay.outcome is None or relay.progress is None:
        return
    try:
        trace_run(relay.outcome, relay.progress.since)
    except Exception as error:
        logger.warning("Could not trace run %s: %r.", relay.outcome.run_name, error)


def refuse(message: str) -> NoReturn:
    """Raise ``ConfigurationError``."""
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
