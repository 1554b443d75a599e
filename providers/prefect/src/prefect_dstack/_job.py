"""What sync and async code share while a run is followed: waiting, telling, deciding what an end means."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefect.context import TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from prefect_dstack import _told
from prefect_dstack._probe import CancelProbe, StopRequested
from prefect_dstack._relay import Relay
from prefect_dstack._report import Report
from prefect_dstack._submit import Target

if TYPE_CHECKING:
    from dstack_core import AsyncRun, Outcome, Run

SLICE_SECONDS = 0.5
_INTERRUPTS = (TerminationSignal, KeyboardInterrupt, SystemExit, asyncio.CancelledError)


@dataclass(slots=True)
class Job:
    """Hold one execution: what to submit, under which name, and who watches it.

    ``is_owned`` tells whether the run is to be stopped when its execution is cut short. ``flow_run_id`` is
    that of the flow run whose log the run's is told in.
    """

    spec: dict[str, Any]
    target: Target
    relay: Relay
    report: Report
    probe: CancelProbe
    logger: Any
    poll_interval: float
    retry_budget: float
    keeps_on_crash: bool
    is_owned: bool = True
    flow_run_id: str | None = None
    started: float = field(default_factory=time.monotonic)

    def sleep(self, seconds: float) -> None:
        """Wait in short slices; raises ``StopRequested`` when the flow run was cancelled meanwhile."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(SLICE_SECONDS, left))
            if self.probe.is_due and (request := self.probe.ask()) is not None:
                raise request

    async def asleep(self, seconds: float) -> None:
        """Wait in short slices: the twin of ``sleep``."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(SLICE_SECONDS, left))
            if self.probe.is_due and (request := await asyncio.to_thread(self.probe.ask)) is not None:
                raise request

    def tell_start(self, run: Run | AsyncRun) -> None:
        """Log which run this is; a log that was told to its end when the run went on is not told again.

        Asks the Prefect server where an earlier execution submitted a run that is over.
        """
        self.logger.info("Run %s: %s", run.name, run.url)
        if not self.target.is_adopted:
            return
        outcome = run.outcome()
        if outcome is not None and self.relay.stream_logs:
            self.relay.stream_logs = not _told.was_told(outcome, self.flow_run_id, self.logger)
        self.logger.info(
            "An earlier execution of this flow run submitted it; %s",
            "it is followed from its first log line on"
            if outcome is None or self.relay.stream_logs
            else "its outcome is taken over",
        )

    def result(self) -> dict[str, Any]:
        """Return the outcome as JSON-plain values, or raise what the run's failure is."""
        from dstack_core import RunError

        outcome = self.relay.outcome
        if outcome is None:
            raise RuntimeError(f"following run {self.target.attempt.run_name} ended without an outcome")
        try:
            outcome.raise_for_status()
        except RunError as error:
            raise type(error)(error.message + self._last_lines(), outcome) from None
        self.logger.info("%s", _in_words(outcome))
        _told.remember(outcome)
        return outcome.to_dict()

    def stops_after(self, error: BaseException) -> bool:
        """Tell whether the run is to be stopped because ``error`` ends its task.

        Errors of the server or the run leave nothing to stop, or nobody to ask.
        """
        from dstack_core import DstackError

        if isinstance(error, DstackError) or not self.is_owned:
            return False
        if not self.keeps_on_crash:
            return True
        if isinstance(error, StopRequested):
            return error.cancelled
        return not isinstance(error, _INTERRUPTS) or self._timed_out() or self._is_cancelled()

    def leave(self, error: BaseException) -> None:
        """Say what becomes of a run that is not stopped although its task ends."""
        from dstack_core import RunNotFoundError, ServerError

        name = self.target.attempt.run_name
        if isinstance(error, RunNotFoundError):
            return
        if isinstance(error, ServerError) and self.relay.progress is not None:
            self.logger.error(
                "Lost sight of run %s; it goes on until its end or its max_duration. Another execution of "
                "this flow run takes it up again; `dstack stop %s` stops it",
                name,
                name,
            )
        elif not isinstance(error, Exception):
            why = 'on_crash="keep"' if self.is_owned else "this flow run did not submit it"
            self.logger.warning("Run %s goes on (%s)", name, why)

    def cancelled(self, request: StopRequested) -> Any:
        """Return the state that a task ends in which no signal reached.

        A state is returned because an exception would make Prefect start the task's next retry.
        """
        name = self.target.attempt.run_name
        done = f"Stopped run {name}" if self.stops_after(request) else f"Left run {name} running"
        return Cancelled(message=f"{done}: {request.reason}.")

    def _last_lines(self) -> str:
        if not self.relay.tail:
            return ""
        return "\n\nThe last lines of its log:\n" + "\n".join(line[:500] for line in self.relay.tail)

    def _timed_out(self) -> bool:
        context = TaskRunContext.get()
        limit = context.task.timeout_seconds if context is not None else None
        return limit is not None and time.monotonic() - self.started >= limit - SLICE_SECONDS

    def _is_cancelled(self) -> bool:
        request = self.probe.ask()
        return request is not None and request.cancelled


def _in_words(outcome: Outcome) -> str:
    parts = [_told.ending(outcome)]
    if outcome.duration is not None:
        parts.append(f"after {outcome.duration:.0f} s")
    parts.append(f"cost ${outcome.cost:.4g}")
    return ", ".join(parts)
