"""What sync and async code share while a run is followed: waiting, logging, deciding what an end means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from prefect_dstack import _log_relay
from prefect_dstack._log_relay import Relay, client_warnings_in
from prefect_dstack._probe import CancelProbe, StopRequested
from prefect_dstack._report import Report
from prefect_dstack._secrets import git_credentials_named
from prefect_dstack._stop import BACKSTOP, BEFORE_THE_KILL, PATIENT, StopTime
from prefect_dstack._submission import Code

if TYPE_CHECKING:
    from dstack_core import AsyncRun, Run
    from dstack_core.integration import Attempt, AttemptNames, StopResult

SLICE_SECONDS = 0.5
_INTERRUPTS = (TerminationSignal, KeyboardInterrupt, SystemExit, asyncio.CancelledError)


@dataclass(slots=True)
class Job:
    """One execution: what to submit, under which name, and where it is shown.

    ``names`` are those of all its attempts, ``attempt`` is the one that is meant at any moment. ``is_owned``
    (bool): the run is stopped when its execution ends early. ``flow_run_id`` (str) is the flow run in whose
    log the run's log is. ``page`` (str) is where a person finds the run. ``stopped`` is what is known after a
    stop, None before. ``code`` is what the client that submits is made with.
    """

    spec: dict[str, Any]
    names: AttemptNames
    attempt: Attempt
    relay: Relay
    report: Report
    probe: CancelProbe
    logger: Any
    poll_interval: float
    retry_budget: float
    keeps_on_crash: bool
    is_owned: bool = True
    flow_run_id: str | None = None
    page: str = ""
    stopped: StopResult | None = None
    code: Code = field(default_factory=Code)

    def sleep(self, seconds: float) -> None:
        """Wait in short slices; raises ``StopRequested`` when the flow run was cancelled meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            time.sleep(max(min(SLICE_SECONDS, deadline - time.monotonic()), 0.0))
            # Also for no time at all: that is how long the first retry of a slow request waits.
            if self.probe.is_due and (request := self.probe.ask()) is not None:
                raise request
            if time.monotonic() >= deadline:
                return

    async def asleep(self, seconds: float) -> None:
        """Wait in short slices: the twin of ``sleep``."""
        deadline = time.monotonic() + seconds
        while True:
            await asyncio.sleep(max(min(SLICE_SECONDS, deadline - time.monotonic()), 0.0))
            if self.probe.is_due and (request := await asyncio.to_thread(self.probe.ask)) is not None:
                raise request
            if time.monotonic() >= deadline:
                return

    def check_flow_run(self) -> None:
        """Raise ``StopRequested`` when the flow run needs no run any more; asks the Prefect server once.

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
        return {**self.spec, "run_name": ref.name, "marker": ref.marker, **fixed}

    @contextmanager
    def submitting(self) -> Iterator[None]:
        """Let an error of the submission say that there may be a run."""
        from dstack_core import ServerUnreachableError

        self.attempt.may_appear = True
        try:
            with git_credentials_named(), client_warnings_in(self.logger):
                yield
        except ServerUnreachableError as error:
            raise ServerUnreachableError(
                f"{error.message.rstrip('.')}. Run {self.attempt.ref.name} may have been submitted. "
                f"Check the list of runs, and stop it there: {self.page}"
            ) from error

    def note(self, run: Run | AsyncRun) -> None:
        """Remember which run it is, so that an interrupted task stops the right one."""
        self.attempt.may_appear = False
        self.attempt.run_id = run.id
        self.page = run.url
        self.relay.note_page(run.url)

    def log_start(self, run: Run | AsyncRun) -> None:
        """Log which run this is, and whether an earlier execution submitted it.

        A log that was relayed to its end is not relayed again; the Prefect server is asked for that where an
        adopted run has ended.
        """
        self.note(run)
        self.logger.info("Run %s: %s", run.name, run.url)
        if not self.attempt.is_adopted:
            return
        outcome = run.outcome()
        if outcome is not None and self.relay.stream_logs:
            self.relay.stream_logs = not _log_relay.was_relayed(outcome, self.flow_run_id, self.logger)
        self.logger.info(
            "An earlier execution of this flow run submitted it; %s",
            "it is followed from its first log line on"
            if outcome is None or self.relay.stream_logs
            else "its outcome is taken over",
        )

    def report_end(self) -> None:
        """Show the end of the run in Prefect."""
        self.report.end(self.relay.outcome, may_be_known=self.attempt.is_adopted)

    def result(self) -> dict[str, Any]:
        """Return the outcome as JSON-plain values, or raise what the run's failure is."""
        from dstack_core.integration import describe_outcome, outcome_dict, raise_for_outcome

        outcome = self.relay.outcome
        if outcome is None:
            raise RuntimeError(f"following run {self.attempt.ref.name} ended without an outcome")
        # Only a task that submits has the option.
        raise_for_outcome(outcome, list(self.relay.tail), retry_option="retry_policy" if self.spec else None)
        self.logger.info("%s", describe_outcome(outcome))
        _log_relay.remember(outcome)
        return outcome_dict(outcome)

    def stops_after(self, error: BaseException) -> bool:
        """Whether the run is to be stopped because ``error`` ends its task.

        An error of the server or the run leaves nothing to stop, or no server to stop it.
        """
        from dstack_core import DstackError

        if isinstance(error, DstackError) or not self.is_owned or not self._may_exist():
            return False
        if not self.keeps_on_crash:
            return True
        if isinstance(error, StopRequested):
            return error.cancelled
        return not isinstance(error, _INTERRUPTS) or self._timed_out() or self._is_cancelled()

    def time_to_stop(self, error: BaseException) -> StopTime:
        """Return how long the stop after ``error`` may take; ``_stop`` explains the two limits.

        Ctrl-C has no limit either: a second one ends the wait.
        """
        if isinstance(error, StopRequested):
            return PATIENT if error.timed_out else BEFORE_THE_KILL
        if isinstance(error, Exception | KeyboardInterrupt):
            return PATIENT
        # An async task gets the same error from a time limit and from a signal to the process.
        is_signal = isinstance(error, TerminationSignal | SystemExit)
        return PATIENT if self._timed_out() and not is_signal else BEFORE_THE_KILL

    def reason_to_stop(self, error: BaseException) -> str | None:
        """Return why the run is stopped after ``error``, as far as this process knows."""
        if isinstance(error, StopRequested):
            return error.reason
        if isinstance(error, KeyboardInterrupt):
            return "Ctrl-C"
        if isinstance(error, TerminationSignal | SystemExit):
            return "the process of the flow run is ending"
        if self._timed_out():
            return "timeout_seconds has passed"
        if isinstance(error, asyncio.CancelledError):
            return "the task was cancelled"
        return f"the task raised {type(error).__name__}"

    def leave(self, error: BaseException) -> None:
        """Log what becomes of a run that is not stopped although its task ends."""
        from dstack_core import RunNotFoundError, ServerError

        name = self.attempt.ref.name
        if isinstance(error, RunNotFoundError):
            return
        if isinstance(error, ServerError) and self.relay.progress is not None:
            self.logger.error(
                "Run %s is not followed any more; it keeps running until its end or its max_duration. "
                "Execute this flow run again to follow it, or stop it on its page: %s",
                name,
                self.page,
            )
        elif not isinstance(error, Exception) and self._may_exist():
            why = 'on_crash="keep"' if self.is_owned else "this flow run did not submit it"
            self.logger.warning("Run %s keeps running (%s): %s", name, why, self.page)

    def cancelled(self, request: StopRequested) -> Any:
        """Return the state that a task ends in which no signal reached.

        A state is returned because an exception would make Prefect start the task's next retry.
        """
        name = self.attempt.ref.name
        if not self._may_exist():
            done = f"Run {name} was not submitted."
        elif self.stops_after(request):
            done = self._stop_in_words()
        else:
            done = f"Run {name} keeps running."
        reason = f"{request.reason[:1].upper()}{request.reason[1:]}"
        return Cancelled(message=f"{reason}. {done}")

    def _stop_in_words(self) -> str:
        """Return what is known of the run after its stop."""
        from dstack_core.integration import StopResult, StopState, describe_end, describe_stop

        if self.relay.outcome is not None:
            return describe_end(self.relay.outcome)
        name = self.attempt.ref.name
        result = self.stopped or StopResult(name, self.page, StopState.UNCONFIRMED, 0, "see the log")
        return describe_stop(result, backstop=BACKSTOP)

    def _may_exist(self) -> bool:
        """Whether there may be a run: not before the submission, unless an earlier execution left one."""
        attempt = self.attempt
        return attempt.run_id is not None or attempt.may_appear or not attempt.is_chosen

    def _timed_out(self) -> bool:
        """Whether the time limit of the task or the flow has passed."""
        task, flow = TaskRunContext.get(), FlowRunContext.get()
        limits = [
            (None if task is None else task.start_time, None if task is None else task.task.timeout_seconds),
            (
                None if flow is None else flow.start_time,
                None if flow is None or flow.flow is None else flow.flow.timeout_seconds,
            ),
        ]
        # Prefect's timers start a little after its contexts, so a limit that has passed is never missed.
        return any(
            started is not None
            and limit is not None
            and time.time() - started.timestamp() >= limit - SLICE_SECONDS
            for started, limit in limits
        )

    def _is_cancelled(self) -> bool:
        request = self.probe.ask()
        return request is not None and request.cancelled
