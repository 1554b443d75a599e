"""The life of one attempt of a job, from submission to its final status (PROTOCOL 1.6).

`JobCarrier.carry` runs the attempt in three parts: wait in each status before the start (`Pace.step`), run
the commands as a local process, clean up. `Ending` holds the request to end; each wait also waits for it.

A running job ends for one of three reasons, whichever comes first: its process exits, a stop request arrives,
or its ``max_duration`` passes. In the last two cases the process gets SIGINT and `Pace.stop_grace` seconds to
exit. A request to end at once (an abort) skips this time or cuts it short. Then whatever is left of the job
is killed.

The order at the end matters to clients: the process has ended and its last output is stored before the job
has a final status, so a client that sees the status can read the whole log (PROTOCOL 1.8).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dstack_core import clock
from dstack_core.local.inventory import no_offers
from dstack_core.local.job_specs import wanted_resources
from dstack_core.local.logs import LogStore
from dstack_core.local.machines import Machine, Machines, NoMachineError
from dstack_core.local.metrics import MetricsStore
from dstack_core.local.process import PtyProcess
from dstack_core.local.project_secrets import ProjectSecrets
from dstack_core.local.references import UnfilledReference
from dstack_core.local.runs import Job, Run, Submission, now
from dstack_core.local.scenarios import Scenario, Scenarios
from dstack_core.local.sleepers import Sleepers, timer
from dstack_core.local.ssh_host import RUNNER_PORT, Door, Place, SshHost
from dstack_core.local.states import JOB_STATUS_OF_REASON
from dstack_core.local.transitions import Transitions
from dstack_core.local.volumes import VolumeError, VolumePool
from dstack_core.local.watchdog import Watchdog
from dstack_core.local.workspace import Sources, Workspace, WorkspaceError


@dataclass(frozen=True)
class Pace:
    """The durations that a server waits, in seconds."""

    # Short: a run takes some 0.3 s more than its commands; a test that must see each status sets more.
    step: float = 0.05
    # As the runner of a real server: SIGINT, and 10 s later SIGKILL (PROTOCOL 1.7).
    stop_grace: float = 10.0
    # Short, so that tests are fast: a real server makes about one attempt a minute (runs_get_retry_error).
    retry_delay: float = 0.2
    # Short for the same reason: a cloud needs minutes to start a machine.
    instance: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """The reason why an attempt ended."""

    reason: str
    exit_status: int | None = None
    message: str | None = None


class Ending:
    """A request to a job to end, gracefully or at once."""

    def __init__(self) -> None:
        self.reason = ""
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def ask(self, reason: str, at_once: bool = False) -> None:
        """Request the end; a request to end at once replaces an earlier, graceful one."""
        if not self.asked.is_set() or (at_once and not self.at_once.is_set()):
            self.reason = reason
        self.asked.set()
        if at_once:
            self.at_once.set()

    async def within(self, seconds: float) -> bool:
        """Wait some seconds for a request and return whether it came."""
        return await clock.await_event(self.asked, seconds, caller=False)


class JobCarrier:
    """The runner of jobs as local processes, each in a directory that is removed with the job."""

    def __init__(
        self,
        machines: Machines,
        pace: Pace,
        directory: Path,
        logs: LogStore,
        transitions: Transitions,
        sources: Callable[[Run], Sources],
        ssh: SshHost,
        metrics: MetricsStore,
        scenarios: Scenarios,
        secrets: ProjectSecrets,
        volumes: VolumePool,
    ) -> None:
        self._machines = machines
        self._pace = pace
        self._directory = directory
        self._logs = logs
        self._set = transitions
        self._sources = sources
        self._ssh = ssh
        self._metrics = metrics
        self._scenarios = scenarios
        self._secrets = secrets
        self._volumes = volumes
        self._sleepers = Sleepers(directory)
        self._watchdog = Watchdog(directory)
        # Where the running jobs run, by submission.
        self._places: dict[str, Place] = {}

    async def close(self) -> None:
        """Kill what is left of any job, and cut the connections of attached clients."""
        self._ssh.close()
        await self._sleepers.close()
        await asyncio.to_thread(self._watchdog.close)

    async def carry(self, run: Run, job: Job, ending: Ending) -> None:
        """Run the newest attempt of a job to its final status; by then its log is stored (PROTOCOL 1.8)."""
        try:
            outcome = await self._attempt(run, job, ending)
        except WorkspaceError as error:
            outcome = Outcome(error.reason, message=str(error))
        except VolumeError as error:
            outcome = Outcome("volume_error", message=str(error))
        except UnfilledReference as error:
            outcome = Outcome("terminated_by_server", message=f"Secrets interpolation error: {error}")
        except OSError as error:
            outcome = Outcome("creating_container_error", message=str(error))
        submission = job.latest
        submission.termination_message = outcome.message
        self._set.job(run, job, "terminating", outcome.reason)
        await clock.asleep(self._pace.step, caller=False)
        submission.exit_status = outcome.exit_status
        submission.finished_at = now()
        self._set.job(run, job, JOB_STATUS_OF_REASON[outcome.reason], outcome.reason)

    async def _attempt(self, run: Run, job: Job, ending: Ending) -> Outcome:
        if await ending.within(self._pace.step):
            return Outcome(ending.reason)
        self._volumes.mounts(job.spec)
        try:
            machine = self._machines.find(run, job)
        except NoMachineError as error:
            return Outcome("failed_to_start_due_to_no_capacity", message=str(error))
        is_lost = False
        try:
            if self._scenarios.take("capacity", run.name) is not None:
                run.fleet = None
                message = no_offers(machine.fleet["name"])
                return Outcome("failed_to_start_due_to_no_capacity", message=message)
            loss = self._scenarios.take("interruption", run.name)
            outcome = await self._on_machine(run, job, ending, machine, loss)
            is_lost = outcome is None
            return outcome or await self._without_machine(ending, machine, loss)
        finally:
            self._volumes.release(job.latest.id)
            self._machines.release(machine, job.latest.id, is_lost=is_lost)

    async def _on_machine(
        self, run: Run, job: Job, ending: Ending, machine: Machine, loss: Scenario | None
    ) -> Outcome | None:
        """Run a job on its machine; return None if the machine was lost meanwhile."""
        # Only a run that allows spot gets a spot machine, and only those are interrupted.
        if loss is not None and loss.is_spot and job.spec["requirements"]["spot"] is not False:
            machine.offer["instance"]["resources"]["spot"] = True
        job.latest.provisioning_data = machine.provisioning_data(self._ssh.port)
        self._set.job(run, job, "provisioning")
        if await ending.within(self._pace.step + (self._pace.instance if machine.is_new else 0)):
            return Outcome(ending.reason)
        self._machines.started(machine)
        self._set.job(run, job, "pulling")
        if await ending.within(self._pace.step):
            return Outcome(ending.reason)
        if (failure := self._scenarios.take("pull", run.name)) is not None:
            return Outcome(
                "creating_container_error", message=f"pullImage error: pull image: {failure.message}"
            )
        # Read when the job starts, so a secret that changes later does not change the job.
        variables = self._secrets.fill_in(job.spec)
        mounts = self._volumes.attach(job, machine)
        workspace = Workspace(self._directory / "jobs" / job.latest.id, job.spec, mounts)
        with clock.Work() as work:
            try:
                await asyncio.to_thread(workspace.prepare, self._sources(run), job.spec)
                return await self._execute(run, job, ending, workspace, variables, machine, work, loss)
            finally:
                await asyncio.to_thread(shutil.rmtree, workspace.root, ignore_errors=True)

    async def _without_machine(self, ending: Ending, machine: Machine, loss: Scenario | None) -> Outcome:
        """Wait until the server gives a lost machine up; the run counts as running until then."""
        noticed_after = 0.0 if loss is None else loss.noticed_after
        if await ending.within(noticed_after):
            return Outcome(ending.reason)
        reason = "interrupted_by_no_capacity" if machine.is_spot else "instance_unreachable"
        return Outcome(reason, message="Instance is unreachable")

    async def _execute(
        self,
        run: Run,
        job: Job,
        ending: Ending,
        workspace: Workspace,
        variables: Mapping[str, str],
        machine: Machine,
        work: clock.Work,
        loss: Scenario | None,
    ) -> Outcome | None:
        """Run the commands; return None if the machine was lost meanwhile."""
        submission = job.latest
        marker = self._watchdog.marker(submission.id)
        process = PtyProcess(lambda text: self._logs.append(run.name, submission.id, text), marker)
        argv = job.spec["commands"] or ["/bin/sh", "-c", ":"]
        self._watchdog.start()
        try:
            environment = workspace.environment(run, job, variables, marker)
            environment |= await self._sleepers.environment(submission.id, environment["PATH"])
            self._sleepers.started(submission.id, work)
            await process.start(argv, environment, workspace.cwd)
            self._places[submission.id] = Place(workspace.cwd, environment)
            self._watchdog.started(process.pid)
            submission.runtime_data = self._runtime_data(run, job, workspace, machine)
            self._set.job(run, job, "running")
            measuring = asyncio.create_task(self._measure(job, process, marker, machine.gpus))
            try:
                return await self._until_end(run, job, ending, process, work, loss)
            finally:
                measuring.cancel()
                await asyncio.gather(measuring, return_exceptions=True)
        finally:
            self._places.pop(submission.id, None)
            self._sleepers.ended(submission.id)
            await process.finish()
            self._watchdog.ended(process)

    async def _until_end(
        self, run: Run, job: Job, ending: Ending, process: PtyProcess, work: clock.Work, loss: Scenario | None
    ) -> Outcome | None:
        exited = asyncio.create_task(process.wait())
        asked = asyncio.create_task(ending.asked.wait())
        at_once = asyncio.create_task(ending.at_once.wait())
        limit, lost = timer(job.spec["max_duration"]), timer(None if loss is None else loss.seconds)
        try:
            await asyncio.wait({exited, asked, limit, lost}, return_when=asyncio.FIRST_COMPLETED)
            work.finish()
            # First: a busy server may see both at once, and the exit on a lost machine is not heard of.
            if lost.done() and not asked.done() and not limit.done():
                return None
            if exited.done() and not asked.done():
                status = exited.result()
                if status == 0:
                    return Outcome("done_by_runner", 0)
                return Outcome("container_exited_with_error", status, "")
            late = Outcome("max_duration_exceeded", message="Max duration exceeded")
            self._set.job(run, job, "terminating", ending.reason or late.reason)
            if not ending.at_once.is_set():
                process.interrupt()
                grace = timer(self._pace.stop_grace)
                await asyncio.wait({exited, at_once, grace}, return_when=asyncio.FIRST_COMPLETED)
                grace.cancel()
            return Outcome(ending.reason) if ending.reason else late
        finally:
            for task in (exited, asked, at_once, limit, lost):
                task.cancel()
            await asyncio.gather(exited, asked, at_once, limit, lost, return_exceptions=True)

    async def _measure(self, job: Job, process: PtyProcess, marker: str, gpus: int) -> None:
        env = job.spec["env"] or {}
        await self._metrics.measure(job.latest.id, process.pid, marker, gpus=gpus, env=env)

    def _door(self, run: Run, submission: Submission) -> Door:
        def read_log(start: datetime | None) -> Iterator[bytes]:
            return self._logs.follow(run.name, submission.id, start, lambda: submission.finished)

        return Door(run.spec.ssh_key_pub or "", read_log, lambda: self._places.get(submission.id))

    def _runtime_data(self, run: Run, job: Job, workspace: Workspace, machine: Machine) -> dict[str, Any]:
        resources = wanted_resources(job.spec)
        return {
            "network_mode": "bridge",
            "gpu": machine.gpus,
            "cpu": float(resources.cpu.count.min or 1),
            "memory": float(resources.memory.min or 1),
            "ports": {str(RUNNER_PORT): RUNNER_PORT, "10022": self._ssh.add(self._door(run, job.latest))},
            "volume_names": [mount.volume for mount in workspace.mounts],
            "offer": machine.offer,
            "working_dir": str(workspace.cwd),
            "username": "root",
        }
