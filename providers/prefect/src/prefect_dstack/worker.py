"""The worker of work pools of type ``dstack``: each flow run on a machine of its own.

The problem: Prefect's base worker submits a flow run and then relies on this process. If the worker ends,
nothing watches the machine; if a flow run is cancelled while its machine is still provisioned, Prefect ends
nothing (measured with 3.8.8: its ``kill_infrastructure`` is called only after 300 s in Cancelling).

The idea: a machine is a dstack task whose marker names the flow run. The worker follows it to its end and
reads the flow run's state between two polls (``_worker_runs.Guard``). With each heartbeat it takes over the
flow runs of workers that ended: it claims them by a label, relays what was not logged yet, and catches up on
a cancellation.

The invariants: a flow run has at most one active machine, whichever worker submits it; a line is relayed by
one worker; a worker that ends leaves its machines running, and a flow run that has ended leaves none.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound
from prefect.logging.loggers import get_worker_logger
from prefect.states import Crashed
from prefect.workers.base import BaseWorker, BaseWorkerResult

from prefect_dstack import _bundles, _report
from prefect_dstack._callbacks import load_in_worker, load_what_can_be, notifier_of_worker
from prefect_dstack._end_reports import StoppingReport, flow_run_of
from prefect_dstack._log_relay import Relay
from prefect_dstack._machine_fallbacks import may_continue, step_after
from prefect_dstack._orphaned_runs import stop_left_over
from prefect_dstack._stop import BACKSTOP
from prefect_dstack._worker_evictions import is_scheduled, may_be_rescheduled, reschedule, stop_machine
from prefect_dstack._worker_runs import (
    Guard,
    HandedOver,
    claim,
    end_of,
    find,
    identifier,
    orphans,
    read_flow_run,
    relayed_lines,
    set_cancelled,
    submit_once,
    worker_of,
)
from prefect_dstack._worker_variables import DstackJobConfiguration, DstackVariables
from prefect_dstack.credentials import PATIENT_TIMEOUT, aload, open_async_client

if TYPE_CHECKING:
    import anyio.abc
    from prefect.client.schemas.objects import FlowRun

    from dstack_core import AsyncClient, AsyncRun
    from dstack_core.integration import CallbackNotifier

# A week: no outage of the dstack server makes a worker give up, since the machine keeps running meanwhile. If
# it did, the flow run would be marked as crashed while it still runs.
_RETRY_BUDGET = 7 * 24 * 3600.0


class DstackWorkerResult(BaseWorkerResult):
    """The end of a flow run's machine; ``failure`` (str) describes one that failed."""

    failure: str | None = None


class DstackWorker(BaseWorker[DstackJobConfiguration, DstackVariables, DstackWorkerResult]):
    """A worker that runs each flow run of a work pool as a dstack task, on a machine of its own.

    Start it with ``prefect worker start --pool NAME --type dstack``. A flow run that is cancelled while its
    machine is still being provisioned is stopped within 10 s; one that has ended leaves no machine running. A
    worker that ends leaves its machines running. If it is started again, it watches them again; otherwise
    another worker of the pool does, once the first is offline (three missed heartbeats). What happened
    meanwhile, such as a cancellation, is caught up on. The events ``dstack.run.started``, ``.stopping`` and
    ``.<final status>`` are emitted for each machine. Source: Prefect's documentation, "Workers".
    """

    type = "dstack"
    job_configuration = DstackJobConfiguration
    job_configuration_variables = DstackVariables
    _description = "Run flow runs on machines that dstack provisions, on any of its clouds and fleets."
    _display_name = "dstack"
    _documentation_url = "https://dstack.ai/docs/"
    _logo_url = "https://github.com/dstackai.png?size=200"

    def __init__(self, *args: Any, adopts: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        # A process that calls one flow leaves the flow runs of other processes to the pool's workers.
        self._adopts = adopts
        self._watched: Counter[UUID] = Counter()
        self._background: set[asyncio.Task[None]] = set()

    async def run(
        self,
        flow_run: FlowRun,
        configuration: DstackJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> DstackWorkerResult:
        """Submit the flow run's machine and watch it to its end; a cancelled flow run gets none.

        Args:
            flow_run: The flow run, from Prefect.
            configuration: Its machine, from Prefect.
            task_status: Where Prefect learns the name of the machine.

        Returns:
            The status of the machine; anything but 0 makes Prefect mark the flow run as Crashed.

        Raises:
            ConfigurationError: A variable has a wrong value; nothing was submitted.
            ServerError: The server errors.
        """
        # Before any request: the next heartbeat must not take it for a flow run without a worker.
        self._watched[flow_run.id] += 1
        try:
            callbacks = await load_in_worker(configuration.all_callbacks)
            block, tags = await aload(configuration.credentials), configuration.automatic_tags
            async with open_async_client(block, tags=tags) as client:
                if await self._needs_no_machine(flow_run):
                    name = identifier(client.project, "none")
                    if task_status is not None:
                        task_status.started(name)
                    return DstackWorkerResult(identifier=name, status_code=0)
                logger = self.get_flow_run_logger(flow_run)
                run = await self._submit(client, flow_run, configuration, logger)
                name = identifier(client.project, run.name)
                if task_status is not None:
                    task_status.started(name)
                return await self._watch(flow_run, configuration, client, run, name, callbacks)
        finally:
            self._forget(flow_run)

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: DstackJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Stop the machine of a flow run; without a grace period its processes are killed.

        Args:
            infrastructure_pid: The project and the name of the machine's run.
            configuration: The flow run's machine, from Prefect.
            grace_seconds: 0 kills its processes; any other number leaves the grace period to dstack.

        Raises:
            InfrastructureNotFound: The machine has ended.
            InfrastructureNotAvailable: It is in another project than this worker's.
            DstackError: The stop was refused or not confirmed, or another server error.
        """
        from dstack_core import DstackError
        from dstack_core.integration import describe_stop

        logger = get_worker_logger(self)
        project, _, run_name = infrastructure_pid.rpartition(":")
        async with open_async_client(
            await aload(configuration.credentials), PATIENT_TIMEOUT, retry_budget=PATIENT_TIMEOUT
        ) as client:
            if project != client.project:
                raise InfrastructureNotAvailable(
                    f"the run {run_name} is in project {project!r}, this worker's is {client.project!r}"
                )
            run = await client.runs.get(run_name)
            if run is None or run.outcome() is not None:
                raise InfrastructureNotFound(f"no active run {run_name} in project {project!r}")
            # If this worker ends before the machine does, the reaper reports the end.
            report = StoppingReport(flow_run_of(run.marker), logger)
            result = await stop_machine(
                client,
                run,
                logger,
                abort=grace_seconds <= 0,
                reason="Prefect ends the flow run's infrastructure",
                backstop=BACKSTOP,
                on_accepted=report,
            )
            report(result)
            if not result.is_safe:
                raise DstackError(describe_stop(result))

    async def sync_with_backend(self) -> None:
        """Send Prefect a heartbeat, and take over the flow runs of workers that ended."""
        await super().sync_with_backend()
        if not self._adopts:
            return
        try:
            await self._take_up_orphans()
        except Exception as error:
            # The next heartbeat tries again.
            get_worker_logger(self).warning("Could not get the flow runs without a worker: %s", error)

    async def teardown(self, *exc_info: Any) -> None:
        """End the watches; their machines keep running."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await super().teardown(*exc_info)

    async def _watch(
        self,
        flow_run: FlowRun,
        configuration: DstackJobConfiguration,
        client: AsyncClient,
        run: AsyncRun,
        name: str,
        callbacks: Sequence[Any] = (),
        before: Counter[str] | None = None,
    ) -> DstackWorkerResult:
        logger = self.get_flow_run_logger(flow_run)
        logger.info("Run %s: %s", run.name, run.url)
        relay = Relay(
            logger,
            stream_logs=configuration.stream_output,
            log_budget_bytes=configuration.log_budget_bytes,
            relayed=before,
        )
        notifier = notifier_of_worker(callbacks, relay, logger, flow_run.id)
        result = await self._follow(flow_run, configuration, client, run, name, relay, notifier, before)
        for pause in notifier.pauses():
            await asyncio.sleep(pause)
        return result

    async def _follow(
        self,
        flow_run: FlowRun,
        configuration: DstackJobConfiguration,
        client: AsyncClient,
        run: AsyncRun,
        name: str,
        relay: Relay,
        notifier: CallbackNotifier,
        before: Counter[str] | None,
    ) -> DstackWorkerResult:
        logger = self.get_flow_run_logger(flow_run)
        emit = partial(
            _report.try_emit, run_name=run.name, run_id=run.id, flow_run_id=flow_run.id, logger=logger
        )
        emit("started", payload={"url": run.url})
        relay.note_page(run.url)
        relay.masker.add(configuration.secrets_in(run.env))
        notifier.submitted(run, client.project, is_taken_over=before is not None)
        guard = Guard(self.client, self.name, flow_run.id, client, run, logger)
        events = run.follow(
            poll_interval=configuration.poll_interval,
            retry_budget=_RETRY_BUDGET,
            sleep=guard.sleep,
            timestamps=configuration.log_timestamps,
            utilization=True,
        )
        try:
            async for event in events:
                relay.handle(event)
                notifier.handle(event)
        except HandedOver:
            # The other worker reports the end; a status other than 0 would mark the flow run as crashed.
            return DstackWorkerResult(identifier=name, status_code=0)
        from dstack_core.integration import describe_failure, outcome_dict

        outcome = relay.outcome
        if outcome is None:
            raise RuntimeError(f"following run {run.name} ended without an outcome")
        emit(str(outcome.status), payload={**outcome_dict(outcome)})
        relay.log_end()
        if outcome.succeeded:
            return DstackWorkerResult(identifier=name, status_code=0)
        found = await read_flow_run(self.client, flow_run.id)
        is_elsewhere = found is not None and worker_of(found) not in (None, self.name)
        if is_elsewhere or self._watched[flow_run.id] > 1:
            # Handed out again meanwhile: who watches its next execution reports how it ends.
            return DstackWorkerResult(identifier=name, status_code=0)
        step = None
        if (ladder := configuration.ladder) is not None and may_continue(found):
            step = await step_after(client, configuration.names(flow_run.id), run, outcome, ladder)
        is_evicted = configuration.is_rescheduled and may_be_rescheduled(found, outcome)
        if is_scheduled(found) or is_evicted or step is not None:
            await self._stop_left_over(flow_run, configuration, crashed=True)
            if is_scheduled(found) or await reschedule(self.client, flow_run.id, outcome, logger, step):
                return DstackWorkerResult(identifier=name, status_code=0)
        has_ended = end_of(found) is not None
        # In the background: Prefect learns of the end only when this returns.
        self._in_background(self._stop_left_over(flow_run, configuration, crashed=not has_ended))
        # A flow run that has ended, or is about to, must not be marked as crashed.
        if has_ended:
            return DstackWorkerResult(identifier=name, status_code=0)
        failure = describe_failure(outcome, list(relay.tail))
        logger.error("%s", describe_failure(outcome) if relay.shows_tail else failure)
        return DstackWorkerResult(identifier=name, status_code=outcome.exit_status or 1, failure=failure)

    async def _submit(
        self, client: AsyncClient, flow_run: FlowRun, configuration: DstackJobConfiguration, logger: Any
    ) -> AsyncRun:
        """Submit the flow run's machine, with the bundle of a flow run that has one."""
        if not configuration.lacks_bundle:
            return await submit_once(client, flow_run.id, configuration, logger, flow_run.run_count)
        found = await _bundles.fetch(flow_run.id)
        if found is None:
            raise LookupError("bundle: expected that of this flow run, got none. Call its flow again.")
        parcel, artifact_id = found
        with tempfile.TemporaryDirectory(prefix="prefect-dstack-") as folder:
            configuration.carry(parcel, Path(folder))
            run = await submit_once(client, flow_run.id, configuration, logger, flow_run.run_count)
        await _bundles.forget(self.client, artifact_id, logger)
        return run

    def _forget(self, flow_run: FlowRun) -> None:
        self._watched[flow_run.id] -= 1
        if self._watched[flow_run.id] <= 0:
            del self._watched[flow_run.id]

    async def _stop_left_over(
        self, flow_run: FlowRun, configuration: DstackJobConfiguration, *, crashed: bool
    ) -> None:
        """Stop and report the runs of a flow run whose machine is gone, and with it the flow's hooks."""
        logger = self.get_flow_run_logger(flow_run)
        try:
            block = await aload(configuration.credentials)
            await asyncio.to_thread(stop_left_over, block, flow_run.id, crashed=crashed, logger=logger)
        except Exception as error:
            logger.warning("Could not stop the runs of this flow run: %s", error)

    async def _take_up_orphans(self) -> None:
        """Watch the flow runs of this pool that no living worker watches."""
        for flow_run in await orphans(self.client, self.work_pool.name, self.name, self._watched):
            self._watched[flow_run.id] += 1
            self._in_background(self._resume(flow_run))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _resume(self, flow_run: FlowRun) -> None:
        """Watch the flow run of a worker that ended; one that never got its machine gets it now."""
        logger = self.get_flow_run_logger(flow_run)
        try:
            if not await claim(self.client, flow_run, self.name):
                return
            configuration = await self.job_configuration.resolve_for_flow_run(
                flow_run,
                client=self.client,
                work_pool=self.work_pool.model_copy(deep=True),
                worker_name=self.name,
                worker_id=self.backend_id,
            )
            block, tags = await aload(configuration.credentials), configuration.automatic_tags
            async with open_async_client(block, tags=tags) as client:
                run = await find(client, flow_run.id, configuration)
                state = flow_run.state
                # Its worker was killed before it had submitted the machine.
                has_bundle = configuration.bundle_is != _bundles.WITH_CALLER
                if run is None and has_bundle and state is not None and state.is_pending():
                    run = await self._submit(client, flow_run, configuration, logger)
                if run is None:
                    await self._without_machine(flow_run, client.project, lost=not has_bundle)
                    return
                name = identifier(client.project, run.name)
                if flow_run.infrastructure_pid != name:
                    await self.client.update_flow_run(flow_run.id, infrastructure_pid=name)
                logger.info("Worker '%s' watches this flow run from now on", self.name)
                before = await relayed_lines(self.client, flow_run.id)
                callbacks = await load_what_can_be(configuration.all_callbacks, logger)
                result = await self._watch(flow_run, configuration, client, run, name, callbacks, before)
            # For a flow run that it handed out itself Prefect does this.
            if result.status_code:
                message = f"The machine of this flow run ended with status {result.status_code}."
                await self.client.set_flow_run_state(flow_run.id, Crashed(message=message))
        except Exception as error:
            logger.warning("Could not take over this flow run: %s", error)
        finally:
            self._forget(flow_run)

    async def _without_machine(self, flow_run: FlowRun, project: str, *, lost: bool) -> None:
        """Set the state of a flow run that has no machine; ``lost``: the process that had its code ended."""
        state = flow_run.state
        if state is not None and state.is_cancelling():
            await set_cancelled(self.client, flow_run.id, "Cancelled before it had a machine.")
        elif lost and state is not None and state.is_pending():
            await self.client.set_flow_run_state(
                flow_run.id, Crashed(message="Its caller ended before it had submitted the machine.")
            )
        elif (flow_run.infrastructure_pid or "").startswith(identifier(project, "")):
            await self.client.set_flow_run_state(
                flow_run.id, Crashed(message="The dstack run of this flow run no longer exists.")
            )

    async def _needs_no_machine(self, flow_run: FlowRun) -> bool:
        """Whether the flow run was cancelled or has ended since Prefect handed it out."""
        state = end_of(await read_flow_run(self.client, flow_run.id))
        if state is None:
            return False
        self.get_flow_run_logger(flow_run).warning("The flow run is %s and gets no machine.", state.name)
        if state.is_cancelling():
            await set_cancelled(self.client, flow_run.id, "Cancelled before it had a machine.")
        return True
