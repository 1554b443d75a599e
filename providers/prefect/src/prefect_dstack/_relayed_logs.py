"""Find out whose log was relayed to its end: that of an adopted run need not be relayed again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack._connect import quick_prefect_client

if TYPE_CHECKING:
    from dstack_core import Outcome

_PAGE = 200
# The last records of this process may still be on their way to the Prefect server.
_by_this_process: set[str] = set()


def ending(outcome: Outcome) -> str:
    """Return what the record begins with that follows all lines of a run.

    The comma tells it from what is logged about a run that was stopped.
    """
    return f"Run {outcome.run_name} {outcome.message}, "


def remember(outcome: Outcome) -> None:
    """Note that this process has relayed the run's log to its end."""
    _by_this_process.add(outcome.run_id)


def was_relayed(outcome: Outcome, flow_run_id: str | None, logger: Any) -> bool:
    """Whether the flow run's log holds the run's log to its end; false where that is unknown."""
    if outcome.run_id in _by_this_process:
        return True
    if flow_run_id is None:
        return False
    try:
        return _is_in_log(ending(outcome), UUID(flow_run_id))
    except Exception as error:
        logger.debug("Prefect did not return the log of this flow run: %s", error)
        return False


def _is_in_log(beginning: str, flow_run_id: UUID) -> bool:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    chosen, offset = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), 0
    with quick_prefect_client() as client:
        # The latest first: records that arrive meanwhile shift the others, so that none is skipped.
        while page := client.read_logs(chosen, _PAGE, offset, LogSort.TIMESTAMP_DESC):
            offset += len(page)
            if any(log.message.startswith(beginning) for log in page):
                return True
    return False
