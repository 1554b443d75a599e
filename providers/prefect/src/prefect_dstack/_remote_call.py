"""One call of a flow that runs on a machine: from its flow run to the machine's end.

The problem: the caller waits in its main thread or its event loop, where Ctrl-C, a SIGTERM of Prefect or a
cancellation may come at any moment, and the machine must not outlive it then.

The idea: a thread with an event loop of its own does everything, with the worker's code: the process is a
worker of the pool for as long as the call lasts, so that another worker takes the flow run over if it is
killed. The caller waits in short slices and, if it is interrupted, asks the thread to stop the machine.

The invariants: a flow run whose machine could not be submitted is Crashed and has no machine. One whose call
was interrupted is Cancelled, and its machine stopped. After ``submit`` the machine outlives this process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun, InfrastructureNotFound
from prefect.states import Cancelling, Crashed, Pending

from prefect_dstack import _bundles
from prefect_dstack._cancellation import SLICE_SECONDS, CancelProbe, current_task_runner
from prefect_dstack._flow_runs import check_pool, create_flow_run, in_thread
from prefect_dstack._stop import BACKSTOP
from prefect_dstack._worker_runs import LABEL, find, identifier, set_cancelled, worker_of
from prefect_dstack.credentials import aload, open_async_client
from prefect_dstack.worker import DstackWorker

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from prefect_dstack._worker_variables import DstackJobConfiguration
    from prefect_dstack.decorators import DstackFlow

_log = logging.getLogger("prefect_dstack")

# Prefect kills the process of a cancelled flow run after 30 s; a stop has to be confirmed before that.
_STOP_SECONDS = 25.0
# A real server needs 2 to 20 s to end a run. Longer, and Prefect kills this process before it has the state.
_END_SECONDS = 15.0
# A submission that was interrupted may appear only in the second poll; the reaper finds what appears later.
_POLLS = 2
_PAUSE = 2.0


class RemoteCall:
    """One call of ``flow`` with ``parameters``; ``flow_run`` is one to execute again, else a new one is made.

    ``flow_run`` (FlowRun) is None until it has been created.
    """

    def __init__(
        self, flow: DstackFlow[..., Any], parameters: dict[str, Any], flow_run: FlowRun | None = None
    ) -> None:
        self._flow = flow
        self._parameters = parameters
        self._is_again = flow_run is not None
        self.flow_run = flow_run
        self.is_submitted = threading.Event()
        self._pid: str | None = None
        self._has_pid = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._is_interrupted = False
        context = FlowRunContext.get()
        parent = context.flow_run if context is not None else None
        self._probe = CancelProbe(None if parent is None else str(parent.id), current_task_runner())
        self._future = in_thread(self._run())

    def wait(self, *, submitted: bool = False) -> None:
        """Wait for the end of the machine, or until it has been submitted.

        Stops the machine and raises whatever interrupts the wait. Raises what the submission raised.
        """
        try:
            while not (self._future.done() or (submitted and self.is_submitted.is_set())):
                concurrent.futures.wait([self._future], SLICE_SECONDS if not submitted else 0.05)
                if self._probe.is_due and (request := self._probe.ask()) is not None:
                    raise CancelledRun(request.reason)
        except BaseException:
            self._interrupt()
            concurrent.futures.wait([self._future], _STOP_SECONDS)
            raise
        finally:
            self._probe.close()
        if self._future.done():
            self._future.result()

    async def await_end(self) -> None:
        """Wait for the end of the machine: the twin of ``wait``."""
        ended = asyncio.wrap_future(self._future)
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=SLICE_SECONDS)
                if self._probe.is_due and (request := await asyncio.to_thread(self._probe.ask)) is not None:
                    raise CancelledRun(request.reason)
        except BaseException:
            self._interrupt()
            await asyncio.wait({ended}, timeout=_STOP_SECONDS)
            if ended.done() and not ended.cancelled():
                # Otherwise asyncio logs that it was never retrieved.
                ended.exception()
            raise
        finally:
            self._probe.close()
        ended.result()

    def started(self, pid: Any) -> None:
        """Note that the machine has been submitted: what a worker calls."""
        self._pid = str(pid)
        self._has_pid.set()
        self.is_submitted.set()

    def _interrupt(self) -> None:
        self._is_interrupted = True
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                # The loop has just ended, and with it the machine.
                return

    async def _run(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self._is_interrupted:
            raise asyncio.CancelledError
        flow = self._flow
        async with DstackWorker(work_pool_name=flow.work_pool, adopts=False) as worker:
            check_pool(worker.work_pool, flow.work_pool)
            configuration: DstackJobConfiguration | None = None
            heartbeats = asyncio.create_task(_send_heartbeats(worker))
            try:
                flow_run = await self._flow_run(worker.client)
                await worker.client.update_flow_run_labels(flow_run.id, {LABEL: worker.name})
                configuration = await worker.job_configuration.resolve_for_flow_run(
                    flow_run,
                    client=worker.client,
                    work_pool=worker.work_pool.model_copy(deep=True),
                    worker_name=worker.name,
                    worker_id=worker.backend_id,
                )
                await self._watch(worker, flow_run, configuration)
            except asyncio.CancelledError:
                if self.flow_run is not None:
                    await self._try_stop(worker, self.flow_run, configuration)
                raise
            except Exception as error:
                if self.flow_run is not None:
                    state: Any = Crashed(message=f"The machine could not be submitted: {error}")
                    await worker.client.set_flow_run_state(self.flow_run.id, state, force=True)
                raise
            finally:
                heartbeats.cancel()

    async def _flow_run(self, client: PrefectClient) -> FlowRun:
        if self.flow_run is None:
            variables = {**self._flow.job_variables, _bundles.VARIABLE: _bundles.WITH_CALLER}
            self.flow_run = await create_flow_run(client, self._flow, self._parameters, variables)
            return self.flow_run
        state: Any = Pending(message="Executed again on a machine.")
        await client.set_flow_run_state(self.flow_run.id, state, force=True)
        self.flow_run = await client.read_flow_run(self.flow_run.id)
        return self.flow_run

    async def _watch(
        self, worker: DstackWorker, flow_run: FlowRun, configuration: DstackJobConfiguration
    ) -> None:
        flow = self._flow
        if flow.credentials is not None:
            configuration.credentials = flow.credentials
        # They are files of the user's own machine.
        configuration.uploads = "allowed"
        configuration.call_too(flow.callbacks)
        # Prefect has the parameters of a flow run that is executed again, and no others.
        values = {} if self._is_again else _bundles.values_to_pickle(self._parameters)
        parcel = _bundles.make(flow.plain, flow_run, values, carries=flow.carries_result)
        noting = asyncio.create_task(self._note_pid(worker.client, flow_run))
        try:
            with tempfile.TemporaryDirectory(prefix="prefect-dstack-") as folder:
                configuration.carry(parcel, Path(folder))
                result = await worker.run(flow_run, configuration, self)
        finally:
            noting.cancel()
        if result.status_code:
            await worker.client.set_flow_run_state(flow_run.id, Crashed(message=result.failure), force=True)
            return
        found = await worker.client.read_flow_run(flow_run.id)
        has_ended = found.state is not None and (found.state.is_final() or found.state.is_paused())
        # Otherwise another worker watches the flow run.
        if not has_ended and worker_of(found) == worker.name:
            state: Any = Crashed(message="Its machine ended before the flow run did.")
            await worker.client.set_flow_run_state(flow_run.id, state)

    async def _note_pid(self, client: PrefectClient, flow_run: FlowRun) -> None:
        """Write the machine's name on the flow run, which is what Prefect's own worker does."""
        await self._has_pid.wait()
        await client.update_flow_run(flow_run.id, infrastructure_pid=self._pid)

    async def _try_stop(
        self, worker: DstackWorker, flow_run: FlowRun, configuration: DstackJobConfiguration | None
    ) -> None:
        try:
            await self._stop(worker, flow_run, configuration)
        except Exception as error:
            logger = worker.get_flow_run_logger(flow_run)
            logger.error("Could not stop the machine of this flow run: %s. %s.", error, BACKSTOP)

    async def _stop(
        self, worker: DstackWorker, flow_run: FlowRun, configuration: DstackJobConfiguration | None
    ) -> None:
        """Cancel the flow run and stop its machine, which a submission may have made a moment ago."""
        try:
            # The machine sees it too; one that starts a moment later does not run the flow.
            await worker.client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
            if configuration is not None:
                await self._stop_machine(worker, flow_run, configuration)
        finally:
            await set_cancelled(worker.client, flow_run.id, "The call of this flow was interrupted.")

    async def _stop_machine(
        self, worker: DstackWorker, flow_run: FlowRun, configuration: DstackJobConfiguration
    ) -> None:
        """Stop the machine and wait a moment for its end.

        The flow in it reports a crash when it is interrupted, which must not come after the cancellation.
        """
        async with open_async_client(await aload(configuration.credentials)) as client:
            for poll in range(1 if self._pid else _POLLS):
                if poll:
                    await asyncio.sleep(_PAUSE)
                if (run := await find(client, flow_run.id, configuration)) is not None:
                    break
            else:
                return
            try:
                await worker.kill_infrastructure(identifier(client.project, run.name), configuration)
                async with asyncio.timeout(_END_SECONDS):
                    while run.outcome() is None:
                        await asyncio.sleep(SLICE_SECONDS)
                        await run.refresh()
            except (InfrastructureNotFound, TimeoutError):
                return


async def _send_heartbeats(worker: DstackWorker) -> None:
    """Keep the process known as a living worker of the pool, so that no other one takes over."""
    while True:
        await asyncio.sleep(worker.heartbeat_interval_seconds)
        try:
            await worker.sync_with_backend()
        except Exception as error:
            # The next heartbeat tries again; meanwhile another worker may take over the watch.
            _log.debug("Could not send a heartbeat: %s", error)
