"""The subflows of a flow run, whose dstack runs are stopped and counted with its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack._cancellation import quick_prefect_client

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

# No flow nests this deep; the limit ends a loop that a broken server would make.
_DEEPEST_SUBFLOW = 10
# As many parents as fit into one request.
_PARENTS = 100


def with_subflows(flow_run_id: UUID, logger: Any) -> list[UUID]:
    """Return the flow run and its subflows; without the Prefect server only the flow run itself."""
    try:
        with quick_prefect_client(30.0) as client:
            return [flow_run_id, *read_subflows(client, flow_run_id)]
    except Exception as error:
        logger.warning("Could not get the subflows of this flow run: %s", error)
        return [flow_run_id]


def read_subflows(client: SyncPrefectClient, flow_run_id: UUID) -> list[UUID]:
    """Return the ids of the subflows of a flow run, and of theirs. Raises what the client raises."""
    found: list[UUID] = []
    parents = [flow_run_id]
    for _ in range(_DEEPEST_SUBFLOW):
        if not parents:
            break
        children = (_children(client, parents[at : at + _PARENTS]) for at in range(0, len(parents), _PARENTS))
        parents = [child for page in children for child in page]
        found += parents
    return found


def _children(client: SyncPrefectClient, parents: list[UUID]) -> list[UUID]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    wanted = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=parents))
    found: dict[UUID, None] = {}
    while True:
        # The server's setting limits a page; only one without anything new is known to be the last.
        page = client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, offset=len(found))
        new = [run.id for run in page if run.id not in found]
        if not new:
            return list(found)
        found |= dict.fromkeys(new)
