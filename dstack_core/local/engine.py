"""The life of runs, from submission to the final status (PROTOCOL 1.6).

Each run has one asyncio task. It repeats attempts until the run has a reason to end: `Replicas` runs the jobs
of one attempt, `JobCarrier` one job. After an attempt the engine decides:

* All wanted jobs are done, or the server ended them after the master was done: ``all_jobs_done``.
* A job failed with an event that the run does not retry: ``job_failed``.
* A job found no capacity, and the retry duration has passed since the submission, or since it lost its last
  machine: ``retry_limit_exceeded``.
* Otherwise the run is ``pending`` for the retry delay, which doubles each time, and every wanted job gets
  another submission.

A stop sets the run to ``terminating`` at once and sends stop requests to its jobs; the task then sees the
reason and finishes. An abort may replace a stop, never the other way round. A run always ends: an exception
in this module ends it as ``failed`` with ``server_error``, because a client waits for the final status.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from dstack_core import clock
from dstack_core.local.job_specs import build_job_specs
from dstack_core.local.jobs import JobCarrier, Pace
from dstack_core.local.replicas import Replicas
from dstack_core.local.runs import Run, Submission, now
from dstack_core.local.specs import RunSpec
from dstack_core.local.states import RUN_STATUS_OF_REASON
from dstack_core.local.transitions import Transitions

logger = logging.getLogger(__name__)

# Seconds. A chosen cap for the delay that doubles with each attempt: a job that keeps failing is retried
# often enough for a user to see it.
_LONGEST_RETRY_DELAY = 60.0


class Engine:
    """The tasks of all runs of a server; call every method in the server's event loop."""

    def __init__(self, carrier: JobCarrier, pace: Pace, transitions: Transitions) -> None:
        self._carrier = carrier
        self._pace = pace
        self._set = transitions
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._replicas: dict[str, Replicas] = {}

    def start(self, run: Run) -> None:
        """Start the task of a new run."""
        self._replicas[run.id] = Replicas(run, self._carrier)
        self._tasks[run.id] = asyncio.create_task(self._carry(run))

    def stop(self, run: Run, abort: bool) -> None:
        """Stop a run for the user; does nothing if it is already ending for another reason (PROTOCOL 1.7)."""
        if run.finished or run.termination_reason not in (None, "stopped_by_user"):
            return
        self._set.run(run, "terminating", "aborted_by_user" if abort else "stopped_by_user")
        reason = "aborted_by_user" if abort else "terminated_by_user"
        self._replicas[run.id].ask(reason, at_once=abort)

    def update(self, run: Run, spec: RunSpec) -> None:
        """Give an active run a new spec, and replace the jobs that no longer fit it."""
        run.spec = spec
        run.deployment_num += 1
        self._replicas[run.id].update(build_job_specs(spec, run.name))

    async def close(self) -> None:
        """Cancel all runs and kill everything that they started."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._carrier.close()

    async def _carry(self, run: Run) -> None:
        try:
            delay = self._pace.retry_delay
            while (reason := await self._attempt(run)) is None:
                # Jobs of the last attempt may have received a stop request because a sibling failed.
                self._replicas[run.id] = Replicas(run, self._carrier)
                self._set.run(run, "pending")
                if await self._replicas[run.id].asked_within(delay):
                    reason = run.termination_reason or ""
                    break
                delay = min(delay * 2, _LONGEST_RETRY_DELAY)
                self._submit_again(run)
            if run.status != "terminating":
                self._set.run(run, "terminating", reason)
                await clock.asleep(self._pace.step, caller=False)
            # An abort may have replaced a stop meanwhile.
            reason = run.termination_reason or reason
            self._set.run(run, RUN_STATUS_OF_REASON[reason], reason)
        except Exception:
            # A run must end whatever happens, or a client that waits for it waits forever.
            logger.exception("The run %s failed because of an error of the embedded server.", run.name)
            self._set.run(run, "failed", "server_error")
        finally:
            self._tasks.pop(run.id, None)
            self._replicas.pop(run.id, None)

    def _submit_again(self, run: Run) -> None:
        run.fleet = None
        for job in filter(lambda each: each.is_wanted, run.jobs):
            job.submissions.append(Submission(job.latest.num + 1, run.deployment_num))
        self._set.run(run, "submitted")

    async def _attempt(self, run: Run) -> str | None:
        """Run every job once; return why the run ends, or None if it is retried."""
        await self._replicas[run.id].carry()
        return run.termination_reason or self._reason(run)

    def _reason(self, run: Run) -> str | None:
        harmless = ("done_by_runner", "terminated_by_server")
        wanted = [job.latest for job in run.jobs if job.is_wanted]
        # The server ends the siblings of a job without a message; a job that lacks a secret has one.
        culprits = [
            one for one in wanted if one.termination_reason not in harmless or one.termination_message
        ]
        if not culprits:
            return "all_jobs_done"
        retry = run.jobs[0].spec["retry"]
        if retry is None or any(one.retry_event not in retry["on_events"] for one in culprits):
            return "job_failed"
        # For missing capacity the duration counts from the submission, or once the run had a machine, from
        # the end of the attempt that had one last. For all else it counts from the last event, so that is
        # retried without limit (runs_get_retry_error: four attempts in four minutes, limit 30 s).
        if any(one.retry_event == "no-capacity" for one in culprits):
            limit = timedelta(seconds=retry["duration"])
            first = run.jobs[0].submissions[0].submitted_at
            ends = [one.finished_at for one in run.jobs[0].submissions if one.provisioning_data is not None]
            if now() - max([first, *filter(None, ends)]) > limit:
                return "retry_limit_exceeded"
        return None
