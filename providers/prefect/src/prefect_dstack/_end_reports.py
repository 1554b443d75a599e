"""Report the end of runs whose own process could not: it was killed before the run had ended.

The problem: hooks, worker and reaper run in other processes. The markers show them the active runs, but not
those that have ended meanwhile, nor what was reported of them.

The idea: Prefect itself is the memory. A progress artifact below 100 % names its run; for a run without
artifacts, a ``dstack.run.stopping`` event without one of an end does. ``_report`` explains why nothing is
reported twice.

The invariants: only the run with the id is reported, never a later one of its name. What has not ended in
time is left to the next process that asks, and a stop that the server dropped meanwhile is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack import _report
from prefect_dstack._cancellation import quick_prefect_client
from prefect_dstack._names import owner_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact
    from prefect.events import ReceivedEvent

    from dstack_core import Client, Outcome, Run
    from dstack_core.integration import StopResult

# As many artifacts as a Prefect server returns at once.
_PAGE = 200
# Artifacts that changed longer ago are not read: no run is expected to take longer. Without the limit a pass
# of the reaper would read all artifacts that the server has ever stored.
_OLDEST_SECONDS = 30 * 24 * 3600.0
# A real server needs 2 to 20 s to end a run (PROTOCOL 5.4); each poll takes one request for each run.
_POLL_SECONDS = 2.0
# As often as the core repeats a dropped stop: more often would only load a server that is busy.
_REPEAT_SECONDS = 5.0
# A reaper that runs at least once a day misses none of these; all events would be too many to search.
_STOPPED_WITHIN = timedelta(days=1)
# As many as Prefect's server returns at once.
_EVENTS = 50
_RESOURCE = "dstack.run."


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


def unreported_stops(api: SyncPrefectClient) -> list[Unreported]:
    """Return the runs that were stopped within the last day and whose end has no event.

    These are runs without a progress artifact, such as those of ``artifacts=False``. Raises what Prefect's
    client raises.
    """
    from dstack_core import RunStatus

    final = [str(status) for status in RunStatus if status.is_finished]
    stopped = {_run_id(event): event for event in _events(api, ["stopping"])}
    ended = {_run_id(event) for event in _events(api, final, list(stopped))} if stopped else set()
    return [
        Unreported(str(event.resource.get("prefect.resource.name")), run_id, event.payload.get("flow_run_id"))
        for run_id, event in stopped.items()
        if run_id not in ended
    ]


def report_ends(
    client: Client,
    runs: Iterable[Unreported],
    *,
    timeout: float,
    logger: Any,
    stopped: Container[str] = (),
) -> list[Outcome]:
    """Report those of the runs that have ended, waiting for the others; return their outcomes.

    Args:
        client: A client of the runs' project.
        runs: The runs to report.
        timeout: Seconds to wait; 0 polls each run once. What has not ended by then is left to the next
            process that asks.
        logger: Where refusals of the Prefect server are logged, and runs that have not ended.
        stopped: The ids of runs whose stop is repeated if the server dropped it.

    Returns:
        The outcomes that were reported now.

    Raises:
        ServerError: The errors of the dstack server.
    """
    waiting = list(runs)
    outcomes: list[Outcome] = []
    started = repeated = time.monotonic()
    while waiting:
        still: list[Unreported] = []
        is_time_to_repeat = time.monotonic() - repeated >= _REPEAT_SECONDS
        for run in waiting:
            found = client.runs.get(run.run_name)
            # Deleted, or its name belongs to a later run: nothing is known of its end.
            if found is None or found.id != run.run_id:
                continue
            outcome = found.outcome()
            if outcome is None:
                still.append(run)
                if run.run_id in stopped and is_time_to_repeat and not found.last_status.is_stopping:
                    _repeat_stop(found, logger)
            elif _reported(run, outcome, logger):
                outcomes.append(outcome)
        waiting = still
        repeated = time.monotonic() if is_time_to_repeat else repeated
        if time.monotonic() + _POLL_SECONDS - started > timeout:
            break
        time.sleep(_POLL_SECONDS)
    # With no timeout nothing was waited for, so that there is nothing to explain.
    for run in waiting if timeout else ():
        logger.warning(
            "Run %s has not ended within %.0f s. The reaper reports its end.", run.run_name, timeout
        )
    return outcomes


def _repeat_stop(run: Run, logger: Any) -> None:
    """Repeat a stop that the server dropped; a failure is logged, since other runs are waited for as well."""
    from dstack_core import ServerError

    try:
        run.stop()
    except ServerError as error:
        logger.error("%s", error.message)


class StoppingReport:
    """The event ``dstack.run.stopping`` of one stop: pass it as ``on_accepted``, then give it the result.

    A Prefect server that refuses the event is logged.
    """

    def __init__(self, flow_run_id: str | None, logger: Any) -> None:
        self._flow_run_id = flow_run_id
        self._logger = logger
        self._was_emitted = False

    def __call__(self, result: StopResult) -> None:
        """Emit the event unless that was done; makes no request."""
        if self._was_emitted or result.run_id is None or not _report.is_going_to_end(result):
            return
        self._was_emitted = True
        payload = _report.stopping_payload(result.url, self._flow_run_id)
        _report.try_emit(
            "stopping",
            result.run_name,
            result.run_id,
            payload,
            flow_run_id=self._flow_run_id,
            logger=self._logger,
        )


def report_earlier_stop(run: Run, logger: Any) -> None:
    """Emit ``dstack.run.stopping`` for a run that another process stopped, unless that did."""
    flow_run_id = flow_run_of(run.marker)
    try:
        with quick_prefect_client() as api:
            if _report.was_emitted(api, "stopping", run.id):
                return
        payload = _report.stopping_payload(run.url, flow_run_id)
        _report.emit("stopping", run.name, run.id, payload, flow_run_id=flow_run_id)
    except Exception as error:
        logger.debug("Prefect did not take an event: %s", error)


def choose_report(shown: dict[str, Unreported], run: Run) -> Unreported:
    """Take the report of a run out of those that have an artifact; else return one without."""
    known = shown.pop(run.id) if run.id in shown else None
    return known or Unreported(run.name, run.id, flow_run_of(run.marker))


def flow_run_of(marker: str | None) -> str | None:
    """Return the id of the flow run that a marker names, or None."""
    kind, owner_id = owner_of(marker) or ("", "")
    return owner_id if kind in ("flow_run", "worker") else None


def _reported(run: Unreported, outcome: Outcome, logger: Any) -> bool:
    """Report the end of a run; false where Prefect refused that, or showed the end already."""
    from dstack_core.integration import describe_outcome

    try:
        with quick_prefect_client() as api:
            is_new = _report_end(api, run, outcome)
    except Exception as error:
        logger.warning("Prefect did not take the report of run %s: %s", run.run_name, error)
        return False
    if is_new:
        logger.info("Reported the end: %s. See %s", describe_outcome(outcome), outcome.url)
    return is_new


def _report_end(api: SyncPrefectClient, run: Unreported, outcome: Outcome) -> bool:
    """Report what Prefect does not show yet; false where there was nothing to report."""
    from dstack_core.integration import outcome_dict, outcome_table

    status = str(outcome.status)
    is_known = _report.was_emitted(api, status, run.run_id)
    if not is_known:
        _report.emit(status, run.run_name, run.run_id, {**outcome_dict(outcome)}, flow_run_id=run.flow_run_id)
    artifact = run.artifact
    if artifact is None:
        return not is_known
    key = (artifact.key or "").removesuffix(_report.PROGRESS_SUFFIX)
    if not _report.has_table(api, key, run.run_name, artifact.flow_run_id):
        _report.create_artifact(
            api,
            key,
            "markdown",
            outcome_table(outcome),
            _report.table_description(run.run_name),
            _report.category_label({"category": outcome.category}) or None,
            flow_run_id=artifact.flow_run_id,
            task_run_id=artifact.task_run_id,
        )
    _report.update_progress(api, artifact.id, run.run_name, status, _report.ENDED_PERCENT)
    return True


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


def _events(
    api: SyncPrefectClient, names: Sequence[str], run_ids: Sequence[str] | None = None
) -> Iterator[ReceivedEvent]:
    from prefect.events.filters import (
        EventFilter,
        EventNameFilter,
        EventOccurredFilter,
        EventResourceFilter,
    )

    chosen = EventFilter(
        event=EventNameFilter(name=[f"dstack.run.{name}" for name in names]),
        occurred=EventOccurredFilter.model_validate({"since": datetime.now(UTC) - _STOPPED_WITHIN}),
    )
    if run_ids is not None:
        chosen.resource = EventResourceFilter(id=[f"{_RESOURCE}{run_id}" for run_id in run_ids])
    page = api.read_events(chosen, limit=_EVENTS)
    while True:
        yield from page.events
        if not page.next_page:
            return
        page = api.read_events_page(str(page.next_page))


def _run_id(event: ReceivedEvent) -> str:
    return event.resource.id.removeprefix(_RESOURCE)
