"""The flow runs of a work pool whose worker ended: find them, claim them, read what was logged of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Container
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

SETTLED_SECONDS = 20.0
# As long as a claim of another worker may take to show.
CLAIM_SECONDS = 5.0
# Prefect's workers label the flow runs they submit so.
_LABEL = "prefect.worker.name"
_WORKER_LOGGER = "prefect.flow_runs.worker"
_PAGE = 200


async def orphans(
    client: PrefectClient, work_pool: str, worker: str, watched: Container[UUID]
) -> list[FlowRun]:
    """Return the active flow runs of the pool that no living worker watches.

    A flow run of this ``worker``'s own name is one too unless it is in ``watched``. Raises what Prefect's
    client raises.
    """
    found = [run for run in await _active(client, work_pool) if run.id not in watched and _is_settled(run)]
    if not found:
        return []
    from prefect.client.schemas.objects import WorkerStatus

    workers = await client.read_workers_for_work_pool(work_pool)
    living = {item.name for item in workers if item.status == WorkerStatus.ONLINE} - {worker}
    return [run for run in found if worker_of(run) not in living]


async def claim(client: PrefectClient, flow_run: FlowRun, worker: str) -> bool:
    """Write on the flow run that ``worker`` watches it; false when another worker did so meanwhile.

    ``flow_run`` is as ``orphans`` returned it. If two do so at once, the later one has it. Raises what
    Prefect's client raises.
    """
    if worker_of(await client.read_flow_run(flow_run.id)) != worker_of(flow_run):
        return False
    await client.update_flow_run_labels(flow_run.id, {_LABEL: worker})
    await asyncio.sleep(CLAIM_SECONDS)
    return worker_of(await client.read_flow_run(flow_run.id)) == worker


def worker_of(flow_run: FlowRun) -> str | None:
    """Return the name of the worker that watches the flow run, or None."""
    name = flow_run.labels.get(_LABEL)
    return None if name is None else str(name)


async def relayed_lines(client: PrefectClient, flow_run_id: UUID) -> Counter[str]:
    """Return the lines that earlier workers relayed into the flow run's log. Raises the client's errors."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    found: Counter[str] = Counter()
    chosen, offset = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), 0
    while page := await client.read_logs(chosen, limit=_PAGE, offset=offset):
        offset += len(page)
        for log in page:
            if log.name == _WORKER_LOGGER:
                found.update(log.message.split("\n"))
    return found


async def _active(client: PrefectClient, work_pool: str) -> list[FlowRun]:
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    active = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    found: list[FlowRun] = []
    while True:
        page = await client.read_flow_runs(
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[work_pool])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=active))),
            sort=FlowRunSort.ID_DESC,
            limit=_PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < _PAGE:
            return found


def _is_settled(flow_run: FlowRun) -> bool:
    """Whether the flow run is in its state for so long that no worker is working on it."""
    state = flow_run.state
    return state is not None and time.time() - state.timestamp.timestamp() > SETTLED_SECONDS
