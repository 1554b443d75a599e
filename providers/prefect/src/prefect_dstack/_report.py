"""Show a run in Prefect: artifacts of its flow run, and events that automations can act on."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

if TYPE_CHECKING:
    from prefect.events import Event as PrefectEvent

    from dstack_core import AsyncRun, Event, Outcome, Run

_REQUEST_SECONDS = 5.0
# How far a run is, as a percentage: the server tells no more than the status.
_PERCENT = {
    "pending": 5.0,
    "submitted": 5.0,
    "provisioning": 20.0,
    "downloading": 35.0,
    "building": 40.0,
    "running": 50.0,
    "uploading": 80.0,
    "stopping": 90.0,
    "terminating": 90.0,
    "aborting": 90.0,
}


class Report:
    """Make the artifacts and events of one run; a Prefect server that refuses them fails no run.

    ``name`` is what the artifacts' keys are made of: equal keys are versions of one artifact in the UI.
    """

    def __init__(self, name: str | None, logger: Any, *, artifacts: bool) -> None:
        self._key = f"dstack-{re.sub('[^a-z0-9]+', '-', (name or 'run').lower()).strip('-') or 'run'}"
        self._logger = logger
        self._artifacts = artifacts
        self._progress: UUID | None = None
        self._started: PrefectEvent | None = None
        self._ended = False

    def start(self, run: Run | AsyncRun) -> None:
        """Emit ``dstack.run.started``; link to the run's page and service, and show how far it is."""
        self._try(lambda: self._emit("started", run.name, run.id, {"url": run.url}))
        if not self._artifacts:
            return
        self._try(lambda: self._link(f"{self._key}-page", run.url, f"Run {run.name} on dstack"))
        service_url = run.service_url
        if service_url is not None:
            self._try(lambda: self._link(f"{self._key}-service", service_url, f"Service {run.name}"))
        if run.outcome() is None:
            self._progress = self._try(lambda: self._new_progress(run))

    def is_shown(self, event: Event) -> bool:
        """Tell whether ``show`` would do anything."""
        return self._progress is not None and hasattr(event, "status")

    def show(self, event: Event) -> None:
        """Bring the progress artifact up to date after a change of status."""
        from dstack_core import StatusChanged

        if self._progress is not None and isinstance(event, StatusChanged):
            name, status = event.progress.run_name, str(event.status)
            self._set_progress(f"Run {name}: {status}", _PERCENT.get(status, 50.0))

    def end(self, outcome: Outcome | None) -> None:
        """Emit ``dstack.run.<status>`` and show the outcome as a table; nothing without an outcome."""
        if outcome is None or self._ended:
            return
        self._ended = True
        status = str(outcome.status)
        self._try(lambda: self._emit(status, outcome.run_name, outcome.run_id, outcome.to_dict()))
        if self._artifacts:
            self._try(lambda: self._table(outcome))
            if self._progress is not None:
                self._set_progress(f"Run {outcome.run_name}: {status}", 100.0)

    def _emit(self, what: str, run_name: str, run_id: str, payload: dict[str, Any]) -> None:
        from prefect.events import emit_event

        event = emit_event(
            f"dstack.run.{what}",
            resource={"prefect.resource.id": f"dstack.run.{run_id}", "prefect.resource.name": run_name},
            payload=payload,
            follows=self._started,
        )
        self._started = self._started or event

    def _link(self, key: str, url: str, description: str) -> None:
        from prefect.artifacts import create_link_artifact

        create_link_artifact(url, key=key, link_text=description, description=description, _sync=True)  # type: ignore[call-arg]

    def _table(self, outcome: Outcome) -> None:
        from prefect.artifacts import create_markdown_artifact

        text = describe(outcome)
        create_markdown_artifact(text, key=self._key, description=f"Run {outcome.run_name}", _sync=True)  # type: ignore[call-arg]

    def _new_progress(self, run: Run | AsyncRun) -> UUID:
        from prefect.artifacts import create_progress_artifact

        text, percent = f"Run {run.name}: submitted", _PERCENT["submitted"]
        key = f"{self._key}-progress"
        made: UUID = create_progress_artifact(percent, key=key, description=text, _sync=True)  # type: ignore[call-arg, assignment]
        return made

    def _set_progress(self, text: str, percent: float) -> None:
        from prefect.artifacts import update_progress_artifact

        self._progress = self._try(
            lambda: update_progress_artifact(self._progress, percent, description=text, _sync=True)  # type: ignore[call-arg, arg-type]
        )

    def _try(self, act: Callable[[], Any]) -> Any:
        quick = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _REQUEST_SECONDS}
        try:
            with temporary_settings(quick):
                return act()
        except Exception as error:
            self._logger.debug("Prefect took no artifact or event: %s", error)
            return None


def describe(outcome: Outcome) -> str:
    """Return the outcome as a Markdown table."""
    machine = " ".join(part for part in (outcome.instance, outcome.backend, outcome.region) if part)
    rows = {
        "Status": f"{outcome.status} ({outcome.message})",
        "Exit status": outcome.exit_status,
        "Instance": machine,
        "Cost": f"${outcome.cost:.4f}",
        "Price": None if outcome.price_per_hour is None else f"${outcome.price_per_hour:g} per hour",
        "Duration": None if outcome.duration is None else str(timedelta(seconds=round(outcome.duration))),
        "Page": f"[{outcome.run_name}]({outcome.url})",
    }
    lines = [
        f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None and value != ""
    ]
    return "\n".join([f"## Run {outcome.run_name}", "", "| | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
