"""The worker of work pools of type ``dstack``: each flow run on a machine of its own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound
from prefect.logging.loggers import get_worker_logger
from prefect.states import Cancelled, Crashed
from prefect.workers.base import BaseWorker, BaseWorkerResult

from prefect_dstack._connect import STOP_BUDGET, aload, open_async_client
from prefect_dstack._machine import DstackJobConfiguration, DstackVariables
from prefect_dstack._machine_runs import find, identifier, submit_once
from prefect_dstack._orphans import claim, orphans, told, worker_of
from prefect_dstack._relay import Relay
from prefect_dstack._secrets import secrets_in

if TYPE_CHECKING:
    import anyio.abc
    from prefect.client.schemas.objects import FlowRun

    from dstack_core import AsyncRun

CHECK_SECONDS = 5.0
# Prefect itself ends a cancelled flow run in its machine, within 30 s and a little.
GRACE_SECONDS = 60.0
# No outage of the dstack server makes a worker give up: the machine goes on all the same.
# How long a stopped machine is looked at for a stop that the server forgot.
INSIST_SECONDS = 10.0
_PATIENCE = 7 * 24 * 3600.0


class _HandedOver(Exception):
    """Leave the watch to the worker that claimed the flow run."""


class DstackWorkerResult(BaseWorkerResult):
    """Tell how the machine of a flow run ended."""


class DstackWorker(BaseWorker[DstackJobConfiguration, DstackVariables, DstackWorkerResult]):
    """Run the flow runs of a work pool on machines that dstack provisions, one dstack task each.

    Start it with ``prefect worker start --pool NAME --type dstack``. A flow run that is cancelled while its
    machine is still being provisioned is stopped within 10 s; one that is over leaves no machine running.
    A worker that ends leaves its machines running; started again, it watches them again, and so does
    one other worker of the pool once the first is offline (three missed heartbeats). What comes meanwhile,
    a cancellation too, is made up for. Source: Prefect's documentation, "Workers".
    """

    type = "dstack"
    job_configuration = DstackJobConfiguration
    job_configuration_variables = DstackVariables
    _description = "Run flow runs on machines that dstack provisions, on any of its clouds and fleets."
    _display_name = "dstack"
    _documentation_url = "https://dstack.ai/docs/"
    _logo_url = "https://github.com/dstackai.png?size=200"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._watched: set[UUID] = set()
        self._resumed: set[asyncio.Task[None]] = set()

    async def run(
        self,
        flow_run: FlowRun,
        configuration: DstackJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> DstackWorkerResult:
        """Submit the flow run's machine and watch it to its end.

        The parameters come from Prefect. Raises ``ConfigurationError`` and the server errors.
        """
        self._watched.add(flow_run.id)
        try:
            async with open_async_client(await aload(configuration.credentials)) as client:
                run = await submit_once(client, flow_run.id, configuration)
                name = identifier(client.project, run.name)
                if task_status is not None:
                    task_status.started(name)
                return await self._watch(flow_run, configuration, run, name)
        finally:
            self._watched.discard(flow_run.id)

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: DstackJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Ask the dstack server to stop the machine of a flow run; without a grace at once.

        Raises ``InfrastructureNotFound`` when it is over already, ``InfrastructureNotAvailable`` when it is
        in another project, and the server errors.
        """
        project, _, run_name = infrastructure_pid.rpartition(":")
        async with open_async_client(
            await aload(configuration.credentials), retry_budget=STOP_BUDGET
        ) as client:
            if project != client.project:
                raise InfrastructureNotAvailable(
                    f"the run {run_name} is in project {project!r}, this worker's is {client.project!r}"
                )
            run = await client.runs.get(run_name)
            if run is None or run.outcome() is not None:
                raise InfrastructureNotFound(f"no active run {run_name} in project {project!r}")
            await run.stop(abort=grace_seconds <= 0, insist_for=INSIST_SECONDS)

    async def sync_with_backend(self) -> None:
        """Tell Prefect that this worker lives, and take up what a worker that ended left behind."""
        await super().sync_with_backend()
        try:
            await self._take_up_orphans()
        except Exception as error:
            get_worker_logger(self).warning("Flow runs without a worker could not be looked up: %s", error)

    async def teardown(self, *exc_info: Any) -> None:
        """End the watches; their machines go on."""
        for task in self._resumed:
            task.cancel()
        await asyncio.gather(*self._resumed, return_exceptions=True)
        await super().teardown(*exc_info)

    async def _watch(
        self,
        flow_run: FlowRun,
        configuration: DstackJobConfiguration,
        run: AsyncRun,
        name: str,
        before: Counter[str] | None = None,
    ) -> DstackWorkerResult:
        logger = self.get_flow_run_logger(flow_run)
        logger.info("Run %s: %s", run.name, run.url)
        relay = Relay(logger, stream_logs=configuration.stream_output, told=before)
        relay.hider.add(secrets_in(run.env))
        events = run.follow(
            poll_interval=configuration.poll_interval,
            retry_budget=_PATIENCE,
            sleep=self._sleep_beside(flow_run.id, run, logger),
        )
        try:
            async for event in events:
                relay.handle(event)
        except _HandedOver:
            return DstackWorkerResult(identifier=name, status_code=0)
        outcome = relay.outcome
        if outcome is None:
            raise RuntimeError(f"following run {run.name} ended without an outcome")
        # A flow run that is over, or about to be, is not to be called crashed.
        if outcome.succeeded or await self._is_over(flow_run.id):
            return DstackWorkerResult(identifier=name, status_code=0)
        lines = "".join(f"\n{line[:500]}" for line in relay.tail)
        logger.error("Run %s %s. See %s%s", run.name, outcome.message, outcome.url, lines)
        return DstackWorkerResult(identifier=name, status_code=outcome.exit_status or 1)

    def _sleep_beside(
        self, flow_run_id: UUID, run: AsyncRun, logger: Any
    ) -> Callable[[float], Awaitable[None]]:
        """Return a sleep that stops the run when its flow run needs no machine any more.

        The sleep raises ``_HandedOver`` when another worker has claimed the flow run: this one was taken
        for dead, and two would tell everything twice.
        """
        asked_at: float | None = None
        over_since: float | None = None
        is_stopped = False

        async def sleep(seconds: float) -> None:
            nonlocal asked_at, over_since, is_stopped
            await asyncio.sleep(min(seconds, CHECK_SECONDS))
            if is_stopped or (asked_at is not None and time.monotonic() - asked_at < CHECK_SECONDS):
                return
            found = await self._flow_run(flow_run_id)
            asked_at = time.monotonic()
            state = None if found is None else found.state
            if found is not None and worker_of(found) not in (None, self.name):
                raise _HandedOver
            if found is None or state is None or not (state.is_final() or state.is_cancelling()):
                over_since = None
                return
            over_since = asked_at if over_since is None else over_since
            has_started = found.start_time is not None
            if has_started and asked_at - over_since < GRACE_SECONDS:
                return
            await run.stop()
            is_stopped = True
            logger.info("Asked the server to stop run %s: its flow run is %s", run.name, state.name)
            if state.is_cancelling():
                await self._set_cancelled(flow_run_id, "Cancelled before its machine was ready.")

        return sleep

    async def _take_up_orphans(self) -> None:
        """Watch the flow runs of this pool that no living worker watches."""
        for flow_run in await orphans(self.client, self.work_pool.name, self.name, self._watched):
            self._watched.add(flow_run.id)
            task = asyncio.create_task(self._resume(flow_run))
            self._resumed.add(task)
            task.add_done_callback(self._resumed.discard)

    async def _resume(self, flow_run: FlowRun) -> None:
        """Watch a flow run again whose worker ended; one that never got its machine gets it now."""
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
            async with open_async_client(await aload(configuration.credentials)) as client:
                run = await find(client, flow_run.id)
                state = flow_run.state
                if run is None and state is not None and state.is_pending():
                    run = await submit_once(client, flow_run.id, configuration)
                if run is None:
                    await self._without_machine(flow_run, client.project)
                    return
                name = identifier(client.project, run.name)
                if flow_run.infrastructure_pid != name:
                    await self.client.update_flow_run(flow_run.id, infrastructure_pid=name)
                logger.info("Worker '%s' watches this flow run from now on", self.name)
                before = await told(self.client, flow_run.id)
                result = await self._watch(flow_run, configuration, run, name, before)
            if result.status_code:
                message = f"The machine of this flow run ended with status {result.status_code}."
                await self.client.set_flow_run_state(flow_run.id, Crashed(message=message))
        except Exception as error:
            logger.warning("This flow run could not be taken up again: %s", error)
        finally:
            self._watched.discard(flow_run.id)

    async def _without_machine(self, flow_run: FlowRun, project: str) -> None:
        state = flow_run.state
        if state is not None and state.is_cancelling():
            await self._set_cancelled(flow_run.id, "Cancelled before it had a machine.")
        elif (flow_run.infrastructure_pid or "").startswith(identifier(project, "")):
            await self.client.set_flow_run_state(
                flow_run.id, Crashed(message="The dstack run of this flow run is gone.")
            )

    async def _flow_run(self, flow_run_id: UUID) -> FlowRun | None:
        try:
            return await self.client.read_flow_run(flow_run_id)
        except Exception:
            return None

    async def _is_over(self, flow_run_id: UUID) -> bool:
        found = await self._flow_run(flow_run_id)
        state = None if found is None else found.state
        return state is not None and (state.is_final() or state.is_cancelling())

    async def _set_cancelled(self, flow_run_id: UUID, message: str) -> None:
        await self.client.set_flow_run_state(flow_run_id, Cancelled(message=message), force=True)
