"""Decide whether the run of a task that ends early is stopped, stop it, and follow it while there is time.

The problem: Prefect kills the process of a cancelled flow run 30 s after the cancellation, and a real server
needs 2 to 20 s to end a run after a stop, more when it is busy. What was not reported by then is lost.

The idea: each caller states its time. Where Prefect will kill the process, the stop has 18 s and the wait for
the end the rest of 22 s, requests included. That leaves 8 s to notice the cancellation and for the flow's own
clean-up. ``dstack.run.stopping`` is emitted as soon as the server has accepted the stop, and a hook, the
worker or the reaper reports the end if the process is gone by then. Nothing kills a task whose time limit
passed or that raised an exception: its stop has as long as a reply may take (30 s), the end two minutes.

The invariants: a stop raises no error of a server, so the task ends with the error that ended it. If the stop
could not be confirmed, the last log line states that, with the run's page. A run that this flow run did not
submit is left alone, and so is one with ``on_crash="keep"`` after a crash.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal

from prefect_dstack._cancellation import SLICE_SECONDS, StopRequested
from prefect_dstack.credentials import PATIENT_TIMEOUT, open_async_client, open_client

if TYPE_CHECKING:
    from dstack_core.integration import StopResult
    from prefect_dstack._job import Job
    from prefect_dstack.credentials import DstackCredentials

# What ends a task from outside; with on_crash="keep" the run outlives these.
_INTERRUPTS = (TerminationSignal, KeyboardInterrupt, SystemExit, asyncio.CancelledError)
# The run prints its last lines in the first seconds; later polls only wait for the end. Slower polls would
# lose lines and the end to the kill.
_POLL_SECONDS = 1.0
# The report of an end takes three short requests to the Prefect server, and fits between the 22 s of a stop
# and the kill after 30 s.
_REPORT_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class StopTime:
    """The seconds that a stop may take, and those that the stop and the run's end may take together."""

    stop: float
    end: float


# Three dropped stops are repeated within 18 s, one every 5 s, and a server that needs 9 s a reply confirms
# the stop. With more than 22 s in all, the kill comes before the last line is logged.
BEFORE_THE_KILL = StopTime(stop=18.0, end=22.0)
# A server that is too busy to end a run within two minutes is left to the reaper.
PATIENT = StopTime(stop=PATIENT_TIMEOUT, end=120.0)
# The first line of a stop that a user's code asks for, logged before any request.
STOPPING = "Stopping run %s: %s"
# What else stops a run whose stop was not confirmed.
BACKSTOP = "The reaper (prefect-dstack reap), where it is scheduled, stops it at its next pass"


def log_stop(logger: Any, result: StopResult) -> None:
    """Log the result of a stop that a user's code asked for; one that failed was raised."""
    from dstack_core.integration import describe_stop

    logger.info("%s", describe_stop(result))


def must_stop(job: Job, error: BaseException) -> bool:
    """Whether the run is to be stopped because ``error`` ends its task.

    An error of the server or the run leaves nothing to stop, or no server to stop it.
    """
    from dstack_core import DstackError

    if isinstance(error, DstackError) or not job.is_owned or not job.may_exist:
        return False
    if not job.keeps_on_crash:
        return True
    if isinstance(error, StopRequested):
        return error.cancelled
    # An exception is not a crash. An interrupt is one, unless a time limit or a cancellation caused it.
    return not isinstance(error, _INTERRUPTS) or _timed_out() or _is_cancelled(job)


def time_to_stop(job: Job, error: BaseException) -> StopTime:
    """Return how long the stop after ``error`` may take; the beginning of this file explains the two limits.

    Nothing kills the process after Ctrl-C either: a second one ends the wait.
    """
    if isinstance(error, StopRequested):
        return PATIENT if error.timed_out else BEFORE_THE_KILL
    if isinstance(error, Exception | KeyboardInterrupt):
        return PATIENT
    # An async task gets the same error from a time limit and from a signal to the process.
    is_signal = isinstance(error, TerminationSignal | SystemExit)
    return PATIENT if _timed_out() and not is_signal else BEFORE_THE_KILL


def reason_to_stop(job: Job, error: BaseException) -> str | None:
    """Return why the run is stopped after ``error``, as far as this process knows."""
    if isinstance(error, StopRequested):
        return error.reason
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C"
    if isinstance(error, TerminationSignal | SystemExit):
        return "the process of the flow run is ending"
    if _timed_out():
        return "timeout_seconds has passed"
    if isinstance(error, asyncio.CancelledError):
        return "the task was cancelled"
    return f"the task raised {type(error).__name__}"


def log_left_running(job: Job, error: BaseException) -> None:
    """Log what becomes of a run that is not stopped although its task ends."""
    from dstack_core import RunNotFoundError, ServerError

    name = job.attempt.ref.name
    if isinstance(error, RunNotFoundError):
        return
    if isinstance(error, ServerError) and job.relay.progress is not None:
        job.logger.error(
            "Run %s is no longer followed; it keeps running until it ends or reaches its max_duration. "
            "Execute this flow run again to follow it, or stop it on its page: %s",
            name,
            job.page,
        )
    elif not isinstance(error, Exception) and job.may_exist:
        why = 'on_crash="keep"' if job.is_owned else "this flow run did not submit it"
        job.logger.warning("Run %s keeps running (%s): %s", name, why, job.page)


def stop(job: Job, block: DstackCredentials | None, allowed: StopTime, reason: str | None = None) -> None:
    """Stop the job's run, relay the rest of its log and report its end. Raises no error of a server.

    A new client is used: the interrupted one may be in the middle of a reply. ``reason`` is why the run is
    stopped. The result is left in ``job.stopped``.
    """
    from dstack_core import WaitTimeoutError
    from dstack_core.integration import stop_run

    deadline = time.monotonic() + allowed.end
    try:
        with open_client(block, allowed.stop, allowed.stop) as client:
            result = stop_run(client, job.attempt.ref, timeout=allowed.stop, **_known(job, reason))
            job.stopped = result
            job.report.stopping(result)
            if _is_worth_following(result):
                left = _left(deadline)
                run = client.runs.get(result.run_name, timeout=left, retry_budget=left)
                # A run that took the name meanwhile is another one.
                if run is not None and result.run_id in (None, run.id):
                    left = _left(deadline)
                    for event in run.follow(
                        job.relay.progress,
                        timeout=left,
                        poll_interval=_POLL_SECONDS,
                        retry_budget=left,
                        report_limits=job.report_limits,
                    ):
                        job.handle(event)
    except WaitTimeoutError:
        _log_unfinished(job)
    except Exception as error:
        _log_failure(job, error)
    except BaseException:
        _log_interrupt(job)
        raise
    job.report_end()


async def astop(
    job: Job, block: DstackCredentials | None, allowed: StopTime, reason: str | None = None
) -> None:
    """Stop the job's run: the twin of ``stop``, shielded from the cancellation that led here."""
    from dstack_core.integration import astop_run

    deadline = time.monotonic() + allowed.end
    # Without the shield the next await would raise the CancelledError of the task again.
    with anyio.move_on_after(allowed.end, shield=True) as waiting:
        try:
            async with open_async_client(block, allowed.stop, allowed.stop) as client:
                result = await astop_run(client, job.attempt.ref, timeout=allowed.stop, **_known(job, reason))
                job.stopped = result
                await anyio.to_thread.run_sync(job.report.stopping, result)
                if _is_worth_following(result):
                    left = deadline - time.monotonic()
                    run = await client.runs.get(result.run_name, retry_budget=left)
                    if run is not None and result.run_id in (None, run.id):
                        events = run.follow(
                            job.relay.progress,
                            poll_interval=_POLL_SECONDS,
                            retry_budget=left,
                            report_limits=job.report_limits,
                        )
                        async with aclosing(events):
                            async for event in events:
                                job.handle(event)
        except Exception as error:
            _log_failure(job, error)
        except BaseException:
            # The end of the allowed time is logged below.
            if not waiting.cancel_called:
                _log_interrupt(job)
            raise
    if waiting.cancelled_caught:
        _log_unfinished(job)
    with anyio.move_on_after(_REPORT_SECONDS, shield=True):
        await anyio.to_thread.run_sync(job.report_end)


def _known(job: Job, reason: str | None) -> dict[str, Any]:
    attempt = job.attempt
    return {
        "log": job.logger,
        "reason": reason,
        "backstop": BACKSTOP,
        # The process may be killed before the stop is confirmed.
        "on_accepted": job.report.accepted,
        "run_id": attempt.run_id,
        "submitted": attempt.run_id is not None,
        "may_appear": attempt.may_appear,
    }


def _is_worth_following(result: StopResult) -> bool:
    # A server that confirms no stop in all that time is unlikely to show an end in the rest of it.
    return result.is_safe and result.state not in ("missing", "other_owner")


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.1)


def _log_failure(job: Job, error: Exception) -> None:
    job.logger.warning(
        "The end of run %s could not be awaited: %s. Its page: %s",
        job.attempt.ref.name,
        str(error).rstrip("."),
        job.page,
    )


def _log_interrupt(job: Job) -> None:
    """Log, as the last line, an interrupted wait for the end; an interrupted stop has logged that itself."""
    if job.stopped is not None and job.relay.outcome is None:
        _log_unfinished(job)


def _log_unfinished(job: Job) -> None:
    """Log, as the last line, that the run has not ended: the line before may be that it is running."""
    job.logger.warning(
        "Run %s has not ended yet, and nothing here waits for it any longer. Its page: %s",
        job.attempt.ref.name,
        job.page,
    )


def _timed_out() -> bool:
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


def _is_cancelled(job: Job) -> bool:
    request = job.probe.ask()
    return request is not None and request.cancelled
