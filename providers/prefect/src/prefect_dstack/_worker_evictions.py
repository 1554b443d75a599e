"""Flow runs that are executed again on another machine, because the first one was interrupted.

The problem: a machine that is interrupted takes its flow run with it, and Prefect would mark it as Crashed.
And a flow run is handed out again as soon as it is scheduled, while its first machine is still ending: a
worker that asks for the flow run's machine would get that one.

The idea: a flow run of an interrupted machine is scheduled again, as Prefect does it for a SIGTERM, and keeps
its id, its parameters and its tags. The next execution waits for the end of the machines of earlier ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.states import AwaitingRetry

from prefect_dstack._machine_fallbacks import may_continue
from prefect_dstack.credentials import PATIENT_TIMEOUT

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas import OrchestrationResult
    from prefect.client.schemas.objects import FlowRun

    from dstack_core import AsyncClient, AsyncRun, Outcome
    from dstack_core.integration import StopResult
    from prefect_dstack._machine_fallbacks import MachineStep

# Prefect kills the process of such a flow run within 30 s, and dstack ends the machine then. A shorter time
# stops a machine that is about to end; a longer one pays for one that is not.
_END_SECONDS = 120.0
# A machine that was stopped and still has not ended: the dstack server has lost it.
_STOPPED_SECONDS = 600.0
_LOOK_SECONDS = 2.0


async def reschedule(
    api: PrefectClient,
    flow_run_id: UUID,
    outcome: Outcome,
    logger: Any,
    step: MachineStep | None = None,
) -> bool:
    """Schedule the flow run of a machine that ended again; return whether Prefect accepted that.

    ``step`` is the one that follows; without any, the machine was interrupted, and the next one has the same
    options.
    """
    ended = "was interrupted" if step is None else outcome.message
    message = f"The machine of run {outcome.run_name} {ended}."
    try:
        result: OrchestrationResult[Any] = await api.set_flow_run_state(
            flow_run_id, AwaitingRetry(message=message)
        )
    except Exception as error:
        logger.warning("Could not schedule the flow run again: %s", error)
        return False
    is_scheduled = result.state is not None and result.state.is_scheduled()
    if is_scheduled:
        machine = "another machine" if step is None else f"another machine: {step}"
        logger.warning("%s The flow run is scheduled again and gets %s.", message, machine)
    return is_scheduled


def may_be_rescheduled(flow_run: FlowRun | None, outcome: Outcome) -> bool:
    """Whether the flow run has not ended, or only by the interruption of its machine."""
    return outcome.category == "spot.interrupted" and may_continue(flow_run)


def is_scheduled(flow_run: FlowRun | None) -> bool:
    """Whether the flow run waits for its next execution."""
    return flow_run is not None and flow_run.state is not None and flow_run.state.is_scheduled()


async def wait_for_end(client: AsyncClient, run: AsyncRun, logger: Any = None) -> None:
    """Wait for the end of an earlier execution's machine; after two minutes it is stopped.

    Raises:
        DstackError: The stop was refused or not confirmed, or the run has not ended ten minutes later.
    """
    from dstack_core import DstackError
    from dstack_core.integration import describe_stop

    logger = logger or logging.getLogger(__name__)
    logger.info("Run %s of the last execution has not ended; the next one waits for that.", run.name)
    started, is_stopped = time.monotonic(), False
    found: AsyncRun | None = run
    while found is not None and found.id == run.id and found.outcome() is None:
        waited = time.monotonic() - started
        if waited > _END_SECONDS + _STOPPED_SECONDS:
            raise DstackError(f"Run {run.name} of the last execution was stopped and has not ended.")
        if waited > _END_SECONDS and not is_stopped:
            result = await stop_machine(
                client, run, logger, reason="the flow run is executed again", backstop="Stop it yourself"
            )
            if not result.is_safe:
                raise DstackError(describe_stop(result))
            is_stopped = True
        await asyncio.sleep(_LOOK_SECONDS)
        found = await client.runs.get(run.name, retry_budget=PATIENT_TIMEOUT)


async def stop_machine(client: AsyncClient, run: AsyncRun, logger: Any, **options: Any) -> StopResult:
    """Stop the machine of a flow run; ``options`` are further ones of ``astop_run``."""
    from dstack_core.integration import RunRef, astop_run

    return await astop_run(
        client,
        RunRef(run.name, run.marker or "", generated=True),
        run_id=run.id,
        timeout=PATIENT_TIMEOUT,
        log=logger,
        **options,
    )
