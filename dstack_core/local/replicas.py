"""The jobs of one attempt of a run: started together, replaced by updates, ended together.

An update compares the live jobs with the new specs, by replica group and node. An equal spec keeps its job.
For any other spec a new job waits in `_waiting` until the old one of its kind, which is ended, has finished.
Live jobs without a spec are ended (scaled down). If another update comes before the old jobs have ended, the
waiting jobs are dropped, and the jobs that are still ending become the predecessors of the new ones.

A real server starts the new replica of a service first and ends the old one when the new one answers. Here
both would use the same port of the same machine, so an old replica ends before its successor starts.

When one wanted job fails, all others are ended; the engine then decides whether to retry the run.
"""

from __future__ import annotations

import asyncio
from typing import Any

from dstack_core.local.jobs import Ending, JobCarrier
from dstack_core.local.runs import Job, Run, Submission

SCALED_DOWN = "scaled_down"
# Keys that identify a job and do not describe what it does.
_IDENTITY = ("replica_num", "job_name")


class Replicas:
    """The jobs of one run in one attempt; call every method in the server's event loop."""

    def __init__(self, run: Run, carrier: JobCarrier) -> None:
        self._run = run
        self._carrier = carrier
        self._endings = [Ending() for _ in run.jobs]
        self._tasks: dict[asyncio.Task[Any], Job] = {}
        # A new job, and the old one that must end before the new one starts.
        self._waiting: list[tuple[Job | None, Job]] = []
        self._changed = asyncio.Event()

    def ask(self, reason: str, *, at_once: bool = False) -> None:
        """Send a stop request to every job."""
        for ending in self._endings:
            ending.ask(reason, at_once=at_once)
        self._waiting.clear()

    async def asked_within(self, seconds: float) -> bool:
        """Wait some seconds for a stop request, and return whether it came."""
        return await self._endings[0].within(seconds)

    def update(self, specs: list[dict[str, Any]]) -> None:
        """Bring the jobs to the run's latest deployment: keep unchanged ones, replace the others."""
        live = [job for job in self._run.jobs if job.is_wanted]
        # Jobs that an earlier update is still ending; the successors that it planned are dropped.
        ending = [old for old, _ in self._waiting if old is not None]
        self._waiting.clear()
        number = max((job.spec["replica_num"] for job in self._run.jobs), default=-1) + 1
        for spec in specs:
            old = next((job for job in live if _belongs(job.spec) == _belongs(spec)), None)
            live = [job for job in live if job is not old]
            if old is not None and _same(old.spec, spec):
                old.latest.deployment_num = self._run.deployment_num
                continue
            if old is not None:
                self._end(old)
            elif ending:
                old = ending.pop(0)
            name = f"{self._run.name}-{spec['job_num']}-{number}"
            new = Job(
                {**spec, "replica_num": number, "job_name": name}, [Submission(0, self._run.deployment_num)]
            )
            self._waiting.append((old, new))
            number += 1
        for surplus in live:
            self._end(surplus)
        self._changed.set()

    async def carry(self) -> None:
        """Run every job until all have ended."""
        try:
            for job, ending in zip(self._run.jobs, self._endings, strict=True):
                if job.is_wanted:
                    self._start(job, ending)
            while self._tasks or self._waiting:
                await self._next()
                self._judge()
                self._start_successors()
        finally:
            # Only a cancelled or failed attempt leaves tasks; they kill their processes before they end.
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _next(self) -> None:
        changed: asyncio.Task[Any] = asyncio.create_task(self._changed.wait())
        try:
            done, _ = await asyncio.wait({*self._tasks, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        self._changed.clear()
        for task in done - {changed}:
            del self._tasks[task]
            task.result()

    def _judge(self) -> None:
        """End all jobs when one has failed, or when the master is done and only it counts."""
        latest = [job.latest for job in self._run.jobs if job.is_wanted]
        failed = any(one.finished and one.status != "done" for one in latest)
        counts = bool(latest) and self._run.spec.setting("stop_criteria") == "master-done"
        master_done = counts and latest[0].status == "done"
        if failed or master_done:
            self.ask("terminated_by_server")

    def _start_successors(self) -> None:
        ready = [(old, new) for old, new in self._waiting if old is None or old.latest.finished]
        self._waiting = [pair for pair in self._waiting if pair not in ready]
        for _, new in ready:
            ending = Ending()
            self._run.jobs.append(new)
            self._endings.append(ending)
            self._start(new, ending)

    def _start(self, job: Job, ending: Ending) -> None:
        self._tasks[asyncio.create_task(self._carrier.carry(self._run, job, ending))] = job

    def _end(self, job: Job) -> None:
        job.is_wanted = False
        if not job.latest.finished:
            index = next(index for index, one in enumerate(self._run.jobs) if one is job)
            self._endings[index].ask(SCALED_DOWN)


def _belongs(spec: dict[str, Any]) -> tuple[Any, ...]:
    return spec["replica_group"], spec["job_num"]


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return {**old, **dict.fromkeys(_IDENTITY)} == {**new, **dict.fromkeys(_IDENTITY)}
