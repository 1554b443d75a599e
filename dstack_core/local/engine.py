"""Carry runs from submission to their final status, one asyncio task a run (PROTOCOL 1.6)."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from dstack_core.local.job_specs import build_job_specs
from dstack_core.local.jobs import JobCarrier, Pace
from dstack_core.local.replicas import Replicas
from dstack_core.local.runs import Run, Submission, now
from dstack_core.local.specs import RunSpec
from dstack_core.local.states import RUN_STATUS_OF_REASON
from dstack_core.local.transitions import Transitions

logger = logging.getLogger(__name__)

_LONGEST_RETRY_DELAY = 40.0


class Engine:
    """Carry all runs of a server; every method belongs to the server's event loop."""

    def __init__(self, carrier: JobCarrier, pace: Pace, transitions: Transitions) -> None:
        self._carrier = carrier
        self._pace = pace
        self._set = transitions
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._replicas: dict[str, Replicas] = {}

    def start(self, run: Run) -> None:
        """Begin to carry a new run."""
        self._replicas[run.id] = Replicas(run, self._carrier)
        self._tasks[run.id] = asyncio.create_task(self._carry(run))

    def stop(self, run: Run, abort: bool) -> None:
        """End a run at the user's wish; nothing happens if it ends for another reason (PROTOCOL 1.7)."""
        if run.finished or run.termination_reason not in (None, "stopped_by_user"):
            return
        self._set.run(run, "terminating", "aborted_by_user" if abort else "stopped_by_user")
        reason = "aborted_by_user" if abort else "terminated_by_user"
        self._replicas[run.id].ask(reason, at_once=abort)

    def update(self, run: Run, spec: RunSpec) -> None:
        """Give an active run a new spec, and replace what it no longer fits."""
        run.spec = spec
        run.deployment_num += 1
        self._replicas[run.id].update(build_job_specs(spec, run.name))

    async def close(self) -> None:
        """Give up all runs and kill everything that was started."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._carrier.close()

    async def _carry(self, run: Run) -> None:
        try:
            delay = self._pace.retry_delay
            while (reason := await self._try(run)) is None:
                # Those of the last try may have been asked to end for the sake of a failed sibling.
                self._replicas[run.id] = Replicas(run, self._carrier)
                self._set.run(run, "pending")
                if await self._replicas[run.id].asked_within(delay):
                    reason = run.termination_reason or ""
                    break
                delay = min(delay * 2, _LONGEST_RETRY_DELAY)
                self._submit_again(run)
            if run.status != "terminating":
                self._set.run(run, "terminating", reason)
                await asyncio.sleep(self._pace.step)
            # An abort may have replaced a stop meanwhile.
            reason = run.termination_reason or reason
            self._set.run(run, RUN_STATUS_OF_REASON[reason], reason)
        except Exception:
            # A run must end whatever happens, or the one who waits for it waits forever.
            logger.exception("the run %s ended by an error of the embedded server", run.name)
            self._set.run(run, "failed", "server_error")
        finally:
            self._tasks.pop(run.id, None)
            self._replicas.pop(run.id, None)

    def _submit_again(self, run: Run) -> None:
        run.fleet = None
        for job in filter(lambda each: each.is_wanted, run.jobs):
            job.submissions.append(Submission(job.latest.num + 1, run.deployment_num))
        self._set.run(run, "submitted")

    async def _try(self, run: Run) -> str | None:
        """Carry every job to its end; return why the run ends, None if it is tried again."""
        await self._replicas[run.id].carry()
        return run.termination_reason or self._reason(run)

    def _reason(self, run: Run) -> str | None:
        harmless = ("done_by_runner", "terminated_by_server")
        wanted = [job.latest for job in run.jobs if job.is_wanted]
        culprits = [latest for latest in wanted if latest.termination_reason not in harmless]
        if not culprits:
            return "all_jobs_done"
        retry = run.jobs[0].spec["retry"]
        if retry is None or any(one.retry_event not in retry["on_events"] for one in culprits):
            return "job_failed"
        # The duration counts from the submission for missing capacity, but from the last event for errors:
        # those are retried again and again (runs_get_retry_error: four tries in four minutes, limit 30 s).
        if any(one.retry_event == "no-capacity" for one in culprits):
            limit = timedelta(seconds=retry["duration"])
            if now() - run.jobs[0].submissions[0].submitted_at > limit:
                return "retry_limit_exceeded"
        return None
