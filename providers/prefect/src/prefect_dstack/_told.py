"""Know which runs' logs were told to their end: they need not be told again with an outcome taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

if TYPE_CHECKING:
    from dstack_core import Outcome

_REQUEST_SECONDS = 5.0
_PAGE = 200
# The last records of this process may still be on their way to the Prefect server.
_by_this_process: set[str] = set()


def ending(outcome: Outcome) -> str:
    """Return what the record begins with that comes after all lines of a run."""
    return f"Run {outcome.run_name} {outcome.message}"


def remember(outcome: Outcome) -> None:
    """Note that this process has told the run's log to its end."""
    _by_this_process.add(outcome.run_id)


def was_told(outcome: Outcome, flow_run_id: str | None, logger: Any) -> bool:
    """Tell whether the flow run's log holds that of the run to its end; false where nobody can tell."""
    if outcome.run_id in _by_this_process:
        return True
    if flow_run_id is None:
        return False
    try:
        return _is_in_log(ending(outcome), UUID(flow_run_id))
    except Exception as error:
        logger.debug("Prefect did not give the log of this flow run: %s", error)
        return False


def _is_in_log(beginning: str, flow_run_id: UUID) -> bool:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    chosen, offset = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])), 0
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": _REQUEST_SECONDS}, sync_client=True) as client,
    ):
        # The latest first: records that come meanwhile move the others on, so that none is skipped.
        while page := client.read_logs(chosen, _PAGE, offset, LogSort.TIMESTAMP_DESC):
            offset += len(page)
            if any(log.message.startswith(beginning) for log in page):
                return True
    return False
