"""Report the end of runs whose own process could not: it was killed before the run had ended.

Used by the hooks, the worker and the reaper. Which runs these are is read from the progress artifacts below
100 %, which name their run; ``_report`` explains why that is enough, and why nothing is reported twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack import _report
from prefect_dstack._connect import quick_prefect_client

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact

    from dstack_core import Client, Outcome, Run

_PAGE = 200
# Artifacts that changed longer ago are not read: no run is expected to take longer.
_OLDEST_SECONDS = 30 * 24 * 3600.0
_POLL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Unreported:
    """A run whose end Prefect does not show yet.

    ``flow_run_id`` (str) is None for a task outside of a flow; ``artifact`` is the progress artifact, None
    for a run without.
    """

    run_name: str
    run_id: str
    flow_run_id: str | None
    artifact: Artifact | None = None


def unreported(api: SyncPrefectClient, flow_run_ids: Iterable[UUID] | None = None) -> list[Unreported]:
    """Return the runs of these flow runs, or of all, whose progress is below 100 %.

    Raises what Prefect's client raises.
    """
    found = []
    for artifact in _progress_artifacts(api, flow_run_ids):
        known = artifact.metadata_ or {}
        run_name, run_id = known.get("run_name"), known.get("run_id")
        if run_name and run_id and _percent(artifact) < _report.ENDED_PERCENT:
            owner = None if artifact.flow_run_id is None else str(artifact.flow_run_id)
            found.append(Unreported(run_name, run_id, owner, artifact))
    return found


def report_ends(client: Client, runs: Iterable[Unreported], *, timeout: float, logger: Any) -> list[Outcome]:
    """Report those of the runs that have ended, waiting for the others; return their outcomes.

    ``timeout`` in seconds; 0 polls each run once. What has not ended by then is left to the next process that
    asks. Raises the server errors; a Prefect server that refuses a report is logged.
    """
    waiting = list(runs)
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + timeout
    while waiting:
        still: list[Unreported] = []
        for run in waiting:
            found = client.runs.get(run.run_name)
            if found is None or found.id != run.run_id:
                continue
            outcome = found.outcome()
            if outcome is None:
                still.append(run)
            elif _reported(run, outcome, logger):
                outcomes.append(outcome)
        waiting = still
        if time.monotonic() + _POLL_SECONDS > deadline:
            break
        time.sleep(_POLL_SECONDS)
    for run in waiting:
        if timeout:
            logger.warning("Run %s has not ended within %.0f s. The reaper reports its end.", run.run_name, timeout)
    return outcomes


def report_stopping(run: Run, flow_run_id: str | None, logger: Any) -> None:
    """Emit ``dstack.run.stopping``; a Prefect server that refuses it is logged."""
    try:
        _report.emit("stopping", run.name, run.id, {"url": run.url}, flow_run_id=flow_run_id)
    except Exception as error:
        logger.debug("Prefect did not take an event: %s", error)


def _reported(run: Unreported, outcome: Outcome, logger: Any) -> bool:
    try:
        with quick_prefect_client() as api:
            _report_end(api, run, outcome)
    except Exception as error:
        logger.warning("Prefect did not take the report of run %s: %s", run.run_name, error)
        return False
    logger.info("Reported the end of run %s: %s (%s)", run.run_name, outcome.message, outcome.url)
    return True


def _report_end(api: SyncPrefectClient, run: Unreported, outcome: Outcome) -> None:
    status = str(outcome.status)
    if not _report.was_emitted(api, status, run.run_id):
        _report.emit(status, run.run_name, run.run_id, outcome.to_dict(), flow_run_id=run.flow_run_id)
    artifact = run.artifact
    if artifact is None:
        return
    key = (artifact.key or "").removesuffix(_report.PROGRESS_SUFFIX)
    _report.create_artifact(
        api,
        key,
        "markdown",
        _report.describe(outcome),
        f"Run {run.run_name}",
        flow_run_id=artifact.flow_run_id,
        task_run_id=artifact.task_run_id,
    )
    _report.update_progress(api, artifact.id, run.run_name, status, _report.ENDED_PERCENT)


def _progress_artifacts(api: SyncPrefectClient, flow_run_ids: Iterable[UUID] | None) -> Iterator[Artifact]:
    from prefect.client.schemas.filters import (
        ArtifactFilter,
        ArtifactFilterFlowRunId,
        ArtifactFilterKey,
        ArtifactFilterType,
    )
    from prefect.client.schemas.sorting import ArtifactSort

    chosen = ArtifactFilter(
        type=ArtifactFilterType(any_=["progress"]),
        key=ArtifactFilterKey(like_=f"dstack-%{_report.PROGRESS_SUFFIX}"),
    )
    if flow_run_ids is not None:
        chosen.flow_run_id = ArtifactFilterFlowRunId(any_=list(flow_run_ids))
    oldest, offset = time.time() - _OLDEST_SECONDS, 0
    while page := api.read_artifacts(
        artifact_filter=chosen, limit=_PAGE, offset=offset, sort=ArtifactSort.UPDATED_DESC
    ):
        offset += len(page)
        for artifact in page:
            if artifact.updated is not None and artifact.updated.timestamp() < oldest:
                return
            yield artifact


def _percent(artifact: Artifact) -> float:
    return artifact.data if isinstance(artifact.data, int | float) else _report.ENDED_PERCENT
