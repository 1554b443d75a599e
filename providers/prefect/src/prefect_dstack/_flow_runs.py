"""What the ways to run a flow of ``@dstack`` share: its flow run, its work pool, a thread for async code."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from prefect.context import FlowRunContext, TagsContext
from prefect.states import Pending
from prefect.tasks import Task

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, WorkPool

    from prefect_dstack.decorators import DstackFlow

T = TypeVar("T")
POOL_TYPE = "dstack"


def in_thread(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run a coroutine in a thread and an event loop of its own, in the context of the caller."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(asyncio.run, work))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="prefect-dstack-flow", daemon=True).start()
    return future


async def create_flow_run(
    client: PrefectClient, flow: DstackFlow[..., Any], parameters: dict[str, Any], variables: dict[str, Any]
) -> FlowRun:
    """Create the flow run in Pending, where no worker takes it; within a flow it is a subflow run.

    Raises what Prefect's client raises.
    """
    parent = None
    if (context := FlowRunContext.get()) is not None:
        task: Task[Any, Any] = Task(name=flow.name, fn=flow.fn, version=flow.version)
        parent = await task.create_run(flow_run_context=context, parameters=parameters)
    return await client.create_flow_run(
        flow,
        parameters=flow.serialize_parameters(parameters),
        state=Pending(),
        job_variables=variables,
        work_pool_name=flow.work_pool,
        tags=TagsContext.get().current_tags,
        parent_task_run_id=None if parent is None else parent.id,
    )


def check_pool(pool: WorkPool, name: str) -> None:
    """Raise ``ConfigurationError`` for a work pool of another type."""
    if pool.type != POOL_TYPE:
        _refuse(
            f'work_pool: expected a work pool of type "dstack", got {name!r} of type "{pool.type}". '
            "Name another one; one that does not exist is created."
        )


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
