"""Show in Prefect what a run reports: metrics, progress, tables, images and links as artifacts, and assets.

The problem: a training reports hundreds of numbers a second, while an artifact costs a request of 10 ms and a
row in Prefect's database. The runs of a sweep report under equal names, and artifacts of equal keys are
versions of one artifact.

The idea: only the newest content of each artifact is kept, and what is due is written together over one
connection. Keys contain the name of the run, which is another one for each run of a sweep. Progress and
metrics are updated in place, as Prefect's own ``update_progress_artifact`` does; each new table, image or
link is a version of its key.

Invariants:
  * ``take`` makes no request, so that it may be called on an event loop; ``write`` blocks.
  * A Prefect server that does not answer costs one request every ten seconds and no content: the newest is
    written later. What it refuses is dropped.
  * An execution that follows a run from its first line again writes to the same keys, and its events of
    assets have the ids of the first ones, which a Prefect server stores once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack._artifact_content import Metrics, emit_materialized, image, link, plain, table
from prefect_dstack._cancellation import quick_prefect_client
from prefect_dstack._report import create_artifact

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from dstack_core import Event

# A person who watches a progress bar expects it to move.
_PROGRESS_SECONDS = 2.0
# A new version of an artifact is a row in Prefect's database: 360 an hour for what changes all the time.
_SECONDS = 10.0
# Artifacts of one run. A name that counts, such as ``batch-1``, ``batch-2``, would fill Prefect's database.
_MOST_ARTIFACTS = 100


@dataclass(slots=True)
class _Artifact:
    """One artifact: its newest content until it is written, and the id under which it is updated."""

    kind: str
    seconds: float
    is_updated: bool
    description: str = ""
    # None: nothing to write. A function, since a table of metrics is made once for many messages.
    content: Callable[[], Any] | None = None
    written_at: float | None = None
    id: UUID | None = None

    def is_due(self, now: float) -> bool:
        return self.content is not None and (self.written_at is None or now >= self.written_at + self.seconds)


class LiveArtifacts:
    """The artifacts of what one run reports, and what else is known of it.

    ``checkpoint`` (str) is the last one reported, ``skipped`` (str) why the run had nothing to do; both None
    without. ``mask`` hides secrets in a text. ``artifacts`` (bool): without, only assets and log lines are
    made. ``flow_run_id`` and ``task_run_id`` own the artifacts.
    """

    def __init__(
        self,
        logger: Any,
        mask: Callable[[str], str],
        *,
        artifacts: bool,
        flow_run_id: object = None,
        task_run_id: object = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checkpoint: str | None = None
        self.skipped: str | None = None
        self._logger = logger
        self._mask = mask
        self._shown = artifacts
        self._owner: dict[str, Any] = {"flow_run_id": flow_run_id, "task_run_id": task_run_id}
        self._clock = clock
        self._artifacts: dict[str, _Artifact] = {}
        # The name that each key stands for: two names may have one slug.
        self._names: dict[str, str] = {}
        self._metrics = Metrics()
        self._assets: dict[tuple[str, str], Mapping[str, Any] | None] = {}
        self._logged_at: float | None = None
        self._silent_until = 0.0
        self._is_full = False

    def take(self, event: Event) -> None:
        """Remember what a run has reported; other events are ignored."""
        from dstack_core import Reported

        if not isinstance(event, Reported):
            return
        payload = event.payload
        name, run_id = event.progress.run_name, event.progress.run_id or ""
        match kind := event.kind:
            case "metric":
                self._take_metrics(name, payload)
            case "progress":
                self._take_progress(name, payload)
            case "table":
                columns, rows = payload["columns"], payload["rows"]
                self._new_version(name, kind, payload["name"], lambda: table(columns, rows, self._mask))
            case "image":
                text = payload.get("text") or payload["name"]
                picture = image(payload["png"], self._mask(text))
                self._new_version(name, kind, payload["name"], lambda: picture, text)
            case "link":
                url, text = payload["url"], payload.get("text") or payload["url"]
                shown = link(self._mask(url), self._mask(text))
                # The cards of Prefect's UI show the description alone.
                self._new_version(name, kind, text, lambda: shown, text if text == url else f"{text}: {url}")
            case "asset":
                self._assets[(run_id, payload["uri"])] = payload.get("metadata")
            case "checkpoint":
                self._take_checkpoint(payload)
            case "skip":
                self.skipped = self._mask(payload["reason"]) or "no reason given"

    @property
    def is_due(self) -> bool:
        """Whether ``write`` would write anything now."""
        now = self._clock()
        if now < self._silent_until:
            return False
        return bool(self._assets) or any(each.is_due(now) for each in self._artifacts.values())

    def write(self, *, everything: bool = False) -> None:
        """Write what is due, or everything that is not written yet; errors of Prefect are logged.

        An error that is not a refusal keeps the rest for the next time.
        """
        if self._assets:
            self._emit_assets()
        now = self._clock()
        # A list: the thread of a cancelled async task may still be here while its stop takes further reports.
        due = {
            key: each
            for key, each in list(self._artifacts.items())
            if (each.content is not None if everything else each.is_due(now))
        }
        if not due:
            return
        try:
            with quick_prefect_client() as api:
                for key, artifact in due.items():
                    self._write(api, key, artifact)
                    artifact.written_at = self._clock()
        except Exception as error:
            self._silent_until = self._clock() + _SECONDS
            self._log(error)

    def _write(self, api: SyncPrefectClient, key: str, artifact: _Artifact) -> None:
        from prefect.client.schemas.actions import ArtifactUpdate
        from prefect.exceptions import PrefectHTTPStatusError

        content = artifact.content
        if content is None:
            return
        data, text = content(), artifact.description
        try:
            if artifact.id is not None:
                api.update_artifact(artifact.id, ArtifactUpdate(data=data, description=text))
            else:
                made = create_artifact(api, key, artifact.kind, data, text, **self._owner)
                artifact.id = made if artifact.is_updated else None
        except PrefectHTTPStatusError as error:
            if error.response.status_code >= 500:
                raise
            self._log(error)
            if artifact.id is not None and error.response.status_code == 404:
                # Deleted in the UI; made again the next time.
                artifact.id = None
                return
        if artifact.content is content:
            artifact.content = None

    def _take_metrics(self, run_name: str, payload: Mapping[str, Any]) -> None:
        from dstack_core.integration import slug

        self._metrics.add(payload)
        key = f"dstack-{slug(run_name, default='run')}-metrics"
        artifact = self._artifact(key, "table", _SECONDS, is_updated=True)
        artifact.content = lambda: self._metrics.table(self._mask)
        artifact.description = f"Metrics of run {run_name}"

    def _take_progress(self, run_name: str, payload: Mapping[str, Any]) -> None:
        from dstack_core.integration import describe_progress, slug

        fraction, text = describe_progress(payload)
        # Another key than that of the run's status, by which other processes find the run.
        key = f"dstack-{slug(run_name, default='run')}-percent"
        artifact = self._artifact(key, "progress", _PROGRESS_SECONDS, is_updated=True)
        artifact.content = lambda: round(fraction * 100, 2)
        # The page of the artifact has "Progress: 70%" below the description.
        artifact.description = f"Run {run_name}: {self._mask(text.removeprefix('Progress: '))}"

    def _take_checkpoint(self, payload: Mapping[str, Any]) -> None:
        step = payload.get("step")
        self.checkpoint = self._mask(payload["path"]) + ("" if step is None else f" (step {plain(step)})")
        now = self._clock()
        if self._logged_at is None or now >= self._logged_at + _SECONDS:
            self._logged_at = now
            self._logger.info("Checkpoint: %s", self.checkpoint)

    def _new_version(
        self, run_name: str, kind: str, name: str, content: Callable[[], Any], text: str | None = None
    ) -> None:
        artifact = self._artifact(
            self._key(run_name, kind, name),
            "table" if kind == "table" else "markdown",
            _SECONDS,
            is_updated=False,
            counts=True,
        )
        artifact.content, artifact.description = content, self._mask(text or name)

    def _key(self, run_name: str, kind: str, name: str) -> str:
        from dstack_core.integration import short_hash, slug

        key = f"dstack-{slug(run_name, default='run')}-{kind}-{slug(name, default=kind)}"
        if self._names.setdefault(key, name) != name:
            key = f"{key}-{short_hash(name, 6)}"
        return key

    def _artifact(
        self, key: str, kind: str, seconds: float, *, is_updated: bool, counts: bool = False
    ) -> _Artifact:
        new = _Artifact(kind, seconds, is_updated)
        if not self._shown or (counts and key not in self._artifacts and self._has_too_many()):
            return new
        return self._artifacts.setdefault(key, new)

    def _has_too_many(self) -> bool:
        if len(self._artifacts) < _MOST_ARTIFACTS:
            return False
        if not self._is_full:
            self._is_full = True
            self._logger.warning(
                "The run reports more than %d artifacts; the others are not shown. Report what belongs "
                "together under one name: each report of it is a version of its artifact.",
                _MOST_ARTIFACTS,
            )
        return True

    def _emit_assets(self) -> None:
        from dstack_core.integration import mask_value

        assets, self._assets = self._assets, {}
        for (run_id, uri), metadata in assets.items():
            try:
                emit_materialized(run_id, uri, mask_value(dict(metadata or {}), self._mask))
            except ValueError:
                self._logger.warning(
                    "asset: expected a URI such as s3://bucket/model.pt, got %r. No asset is recorded.",
                    self._mask(uri),
                )
            except Exception as error:
                self._log(error)

    def _log(self, error: Exception) -> None:
        self._logger.debug("Prefect did not take an artifact or event: %s", error)
