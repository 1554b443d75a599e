"""Show a run in Prefect: artifacts of its flow run, and events that automations can act on.

The problem: several processes report the same run. The task's process may be killed before the run has ended;
then a hook, the worker or the reaper reports the end, and none of them knows what the others did.

The idea: the id of an event is made from the run's id and the event's name. A Prefect server stores one event
per id, and its automations ignore an id that they saw within the last five minutes (measured on 3.8.8, which
keeps that in memory: also across a restart there was one event). A process that did not follow the run itself
asks for the event before it emits it.

The end is reported in the order event, table, progress: a progress artifact at 100 % means that all of it is
there, and one below 100 % is what other processes search for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect_dstack._cancellation import quick_prefect_client

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events import Event as PrefectEvent

    from dstack_core import AsyncRun, Event, Outcome, Run
    from dstack_core.integration import StopResult

CATEGORY_LABEL = "dstack.category"
PROGRESS_SUFFIX = "-progress"
ENDED_PERCENT = 100.0
# As many artifacts as a Prefect server returns at once.
_PAGE = 200
# An event of more than 1 MiB is refused, and with it those that are sent after it over the same connection.
_RESULT_CHARACTERS = 100_000


class Report:
    """The artifacts and events of one run; if a Prefect server refuses them, no run fails.

    ``name`` is what the artifacts' keys are made of: equal keys are versions of one artifact in the UI.
    ``flow_run_id`` and ``task_run_id`` (str or UUID) own the artifacts.
    """

    def __init__(
        self,
        name: str | None,
        logger: Any,
        *,
        artifacts: bool,
        flow_run_id: object = None,
        task_run_id: object = None,
    ) -> None:
        from dstack_core.integration import slug

        self._key = f"dstack-{slug(name, default='run')}"
        self._logger = logger
        self._artifacts = artifacts
        self._owner: dict[str, Any] = {"flow_run_id": flow_run_id, "task_run_id": task_run_id}
        self._progress: UUID | None = None
        self._last: PrefectEvent | None = None
        self._ended = False
        self._is_stopping = False

    def start(self, run: Run | AsyncRun) -> None:
        """Emit ``dstack.run.started``, link to the run's page and service, and show the progress."""
        # An adopted run emits it again with the same id, which the server ignores.
        self._emit("started", run.name, run.id, {"url": run.url})
        if not self._artifacts:
            return
        # One connection for all of them; each artifact that is refused is logged on its own.
        self._with_api(lambda api: self._create_first(api, run))

    def _create_first(self, api: SyncPrefectClient, run: Run | AsyncRun) -> None:
        from dstack_core import RunStatus
        from dstack_core.integration import describe_status

        self._create(api, f"{self._key}-page", *_run_links(run))
        if run.service_url is not None:
            url = run.browser_service_url or run.service_url
            self._create(api, f"{self._key}-service", *_link(url, f"Service {run.name}"))
        if run.outcome() is None:
            text = describe_status(run.name, "submitted")
            percent = RunStatus.SUBMITTED.percent
            known = {"run_name": run.name, "run_id": run.id}
            self._progress = self._create(
                api, f"{self._key}{PROGRESS_SUFFIX}", "progress", percent, text, known
            )

    def is_shown(self, event: Event) -> bool:
        """Whether ``show`` would do anything."""
        return self._progress is not None and hasattr(event, "status")

    def show(self, event: Event) -> None:
        """Update the progress artifact after a change of status."""
        from dstack_core import StatusChanged

        if isinstance(event, StatusChanged):
            self._set_progress(event.progress.run_name, str(event.status), event.status.percent)

    def announce(self, event: Event) -> None:
        """Emit ``dstack.run.running`` once the commands have started; makes no request."""
        from dstack_core import RunStatus, StatusChanged

        if isinstance(event, StatusChanged) and event.status is RunStatus.RUNNING:
            progress = event.progress
            # Nothing follows it: a run may pass this status between two polls.
            try_emit("running", progress.run_name, progress.run_id or "", {}, logger=self._logger)

    def accepted(self, result: StopResult) -> None:
        """Emit ``dstack.run.stopping``, once: for a stop that the server has accepted just now.

        Makes no request: Prefect sends events from a thread of its own.
        """
        if result.run_id is None or self._ended or self._is_stopping or not is_going_to_end(result):
            return
        self._is_stopping = True
        payload = stopping_payload(result.url, self._owner["flow_run_id"])
        self._emit("stopping", result.run_name, result.run_id, payload)

    def stopping(self, result: StopResult) -> None:
        """Show that the run is stopping; emit the event where another process had stopped it."""
        from dstack_core import RunStatus

        self.accepted(result)
        if self._is_stopping and not self._ended:
            status = RunStatus.STOPPING
            self._set_progress(result.run_name, str(status), status.percent)

    def end_of_step(self, outcome: Outcome) -> None:
        """Show that the run of a step has ended; what follows is another run of the same task."""
        self._set_progress(outcome.run_name, str(outcome.status), ENDED_PERCENT)
        self._progress = None

    def end(
        self,
        outcome: Outcome | None,
        *,
        may_be_known: bool = False,
        more: Mapping[str, str | None] | None = None,
    ) -> None:
        """Emit ``dstack.run.<status>`` and show the outcome as a table; nothing without an outcome.

        ``may_be_known``: another process may have done so before. ``more`` are further rows.
        """
        if outcome is None or self._ended:
            return
        self._ended = True
        from dstack_core.integration import outcome_table

        status = str(outcome.status)
        if not (may_be_known and self._is_known(outcome)):
            self._emit(status, outcome.run_name, outcome.run_id, end_payload(outcome))
        if self._artifacts:
            table = outcome_table(outcome) + _rows(more or {})
            self._with_api(lambda api: self._create_last(api, outcome, table))

    def _create_last(self, api: SyncPrefectClient, outcome: Outcome, table: str) -> None:
        label = category_label({"category": outcome.category})
        self._create(api, self._key, "markdown", table, table_description(outcome.run_name), label or None)
        if outcome.utilization is not None:
            description = f"Utilization of run {outcome.run_name}"
            self._create(api, f"{self._key}-utilization", "markdown", _chart(outcome), description)
        if self._progress is not None:
            update_progress(api, self._progress, outcome.run_name, str(outcome.status), ENDED_PERCENT)

    def _emit(self, what: str, run_name: str, run_id: str, payload: dict[str, Any]) -> None:
        event = try_emit(what, run_name, run_id, payload, logger=self._logger, follows=self._last)
        self._last = event or self._last

    def _is_known(self, outcome: Outcome) -> bool:
        def ask() -> bool:
            with quick_prefect_client() as api:
                return was_emitted(api, str(outcome.status), outcome.run_id)

        return bool(self._try(ask))

    def _create(self, api: SyncPrefectClient, key: str, *values: Any) -> UUID | None:
        made: UUID | None = self._try(lambda: create_artifact(api, key, *values, **self._owner))
        return made

    def _set_progress(self, run_name: str, status: str, percent: float) -> None:
        progress = self._progress
        if progress is not None:
            self._with_api(lambda api: update_progress(api, progress, run_name, status, percent))

    def _with_api(self, act: Callable[[SyncPrefectClient], None]) -> None:
        """Do something with a client of the Prefect server; errors are logged, also that of opening it."""

        def connected() -> None:
            with quick_prefect_client() as api:
                act(api)

        self._try(connected)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            self._log(error)
            return None

    def _log(self, error: Exception) -> None:
        self._logger.debug("Prefect did not take an artifact or event: %s", error)


def is_going_to_end(result: StopResult) -> bool:
    """Whether the run is known to end because of a stop."""
    return result.state in ("stopping", "accepted") or (result.state == "ended" and result.requests > 0)


def end_payload(outcome: Outcome) -> dict[str, Any]:
    """Return what ``dstack.run.<status>`` holds: the outcome, without a result that is too large for it."""
    from dstack_core.integration import outcome_dict

    payload = outcome_dict(outcome)
    if len(json.dumps(payload["result"])) > _RESULT_CHARACTERS:
        payload["result"] = None
    return {**payload}


def category_label(payload: Mapping[str, Any]) -> dict[str, str]:
    """Return the label of a run that failed, by which automations and filters find it."""
    category = payload.get("category")
    return {CATEGORY_LABEL: str(category)} if category else {}


def stopping_payload(url: str, flow_run_id: object) -> dict[str, Any]:
    """Return what ``dstack.run.stopping`` holds; the reaper reads the flow run from it."""
    return {"url": url, "flow_run_id": None if flow_run_id is None else str(flow_run_id)}


def emit(
    what: str,
    run_name: str,
    run_id: str,
    payload: dict[str, Any],
    *,
    flow_run_id: object = None,
    follows: PrefectEvent | None = None,
) -> PrefectEvent | None:
    """Emit ``dstack.run.<what>``, once per run. Prefect itself adds the flow and task run of the context.

    ``flow_run_id`` names the flow run outside of one. The label ``dstack.category`` is that of an outcome in
    the payload. Raises what Prefect raises.
    """
    from prefect.events import emit_event

    resource = {"prefect.resource.id": f"dstack.run.{run_id}", "prefect.resource.name": run_name}
    related = [] if flow_run_id is None else [_flow_run_resource(flow_run_id)]
    return emit_event(
        f"dstack.run.{what}",
        resource=resource | category_label(payload),
        related=related,
        payload=payload,
        id=event_id(what, run_id),
        follows=follows,
    )


def try_emit(
    what: str, run_name: str, run_id: str, payload: dict[str, Any], *, logger: Any, **options: Any
) -> PrefectEvent | None:
    """Emit as ``emit`` does; a refusal is logged, since no run may fail over it."""
    try:
        return emit(what, run_name, run_id, payload, **options)
    except Exception as error:
        logger.debug("Prefect did not take an event: %s", error)
        return None


def event_id(what: str, run_id: str) -> UUID:
    """Return the id of a run's event, the same in every process."""
    return uuid5(NAMESPACE_URL, f"dstack.run.{what}/{run_id}")


def was_emitted(api: SyncPrefectClient, what: str, run_id: str) -> bool:
    """Whether the Prefect server has the event. Raises what Prefect's client raises."""
    from prefect.events.filters import EventFilter, EventIDFilter

    # The client's default limit is above what its server allows.
    return bool(api.read_events(EventFilter(id=EventIDFilter(id=[event_id(what, run_id)])), limit=1).events)


def create_artifact(
    api: SyncPrefectClient,
    key: str,
    kind: str,
    data: Any,
    description: str,
    metadata: dict[str, str] | None = None,
    **owner: Any,
) -> UUID:
    """Create an artifact. Raises what Prefect's client raises."""
    from prefect.client.schemas.actions import ArtifactCreate

    owned = {name: value for name, value in owner.items() if value is not None}
    if metadata is not None:
        owned["metadata_"] = metadata
    artifact = ArtifactCreate(key=key, type=kind, data=data, description=description, **owned)
    return api.create_artifact(artifact).id


def has_table(api: SyncPrefectClient, key: str, run_name: str, flow_run_id: UUID | None) -> bool:
    """Whether the outcome of a run is shown already. Raises what Prefect's client raises.

    A process that was killed, or refused, between the table and the progress leaves the latter below 100 %.
    """
    from prefect.client.schemas.filters import (
        ArtifactFilter,
        ArtifactFilterFlowRunId,
        ArtifactFilterKey,
        ArtifactFilterType,
    )

    chosen = ArtifactFilter(type=ArtifactFilterType(any_=["markdown"]), key=ArtifactFilterKey(any_=[key]))
    if flow_run_id is not None:
        chosen.flow_run_id = ArtifactFilterFlowRunId(any_=[flow_run_id])
    found = api.read_artifacts(artifact_filter=chosen, limit=_PAGE)
    return any(artifact.description == table_description(run_name) for artifact in found)


def table_description(run_name: str) -> str:
    """Return the description of a run's outcome table, by which other processes find it."""
    return f"Run {run_name}"


def update_progress(
    api: SyncPrefectClient, artifact_id: UUID, run_name: str, status: str, percent: float
) -> None:
    """Update a progress artifact. Raises what Prefect's client raises."""
    from prefect.client.schemas.actions import ArtifactUpdate

    from dstack_core.integration import describe_status

    update = ArtifactUpdate(data=percent, description=describe_status(run_name, status))
    api.update_artifact(artifact_id, update)


def _flow_run_resource(flow_run_id: object) -> dict[str, str]:
    return {"prefect.resource.id": f"prefect.flow-run.{flow_run_id}", "prefect.resource.role": "flow-run"}


def _run_links(run: Run | AsyncRun) -> tuple[str, str, str]:
    """Return the artifact with the links to the pages of a run."""
    kind, link, text = _link(run.url, f"Run {run.name} on dstack")
    pages = {"log": run.logs_url if run.logs_url != run.url else None, "metrics": run.metrics_url}
    more = [f"[{name}]({url})" for name, url in pages.items() if url is not None]
    return kind, " · ".join([link, *more]), text


def _link(url: str, text: str) -> tuple[str, str, str]:
    return "markdown", f"[{text}]({url})", text


def _chart(outcome: Outcome) -> str:
    """Return the utilization of a run that has one in Markdown: the numbers, the advice and a chart."""
    from dstack_core.integration import utilization_lines

    usage = outcome.utilization
    image = "" if usage is None else f"![Utilization]({usage.plot(f'Run {outcome.run_name}').data_uri})"
    return "\n\n".join([*utilization_lines(outcome), image])


def _rows(more: Mapping[str, str | None]) -> str:
    """Return rows for the end of a Markdown table; none for what is None."""
    cells = {label: " ".join(text.split()).replace("|", "\\|") for label, text in more.items() if text}
    return "".join(f"\n| {label} | {cell} |" for label, cell in cells.items())
