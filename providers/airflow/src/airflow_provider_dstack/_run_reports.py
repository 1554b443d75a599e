"""What a run reports beside its log, as Airflow shows it: XComs of the task, and the events of its outlets.

The problem: messages come while the task waits in the worker, in one triggerer after another, and in the
resumed task. An XCom has one value, so each process must know what the earlier ones received; and a training
that reports each step must not write to Airflow's database each time.

The idea: ``RunReports`` keeps the last value of everything, which is bounded, and its state is saved and
handed over with the position in the log. What changed is pushed when the position is saved, every ten seconds
at most, and everything once more when the run has ended.

Invariant: a state contains exactly the messages before its position. A message that is received again after a
takeover replaces itself.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import push_xcom

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context, TaskInstanceLike
    from dstack_core import Outcome, Reported

METRICS_KEY = "dstack_metrics"
LINKS_KEY = "dstack_links"
TABLES_KEY = "dstack_tables"
ASSETS_KEY = "dstack_assets"
CHECKPOINT_KEY = "dstack_checkpoint"
UTILIZATION_KEY = "dstack_utilization"
_KEYS = (METRICS_KEY, LINKS_KEY, TABLES_KEY, ASSETS_KEY, CHECKPOINT_KEY, UTILIZATION_KEY)
# As ``_trigger_relay.SECONDS_BETWEEN``: what Airflow's database takes from thousands of tasks.
SECONDS_BETWEEN = 10.0
# The state is saved every ten seconds and is part of the trigger's event, so it has to stay small.
_MOST_METRICS = 1000
_MOST_ITEMS = 100
_TABLES_BYTES = 64 * 1024
_ITEM_BYTES = 8 * 1024

Record = tuple[int, str]


class RunReports:
    """The last value of each thing that one run has reported.

    ``state`` is what another process left; ``mask`` hides secrets in a text.
    """

    def __init__(
        self, state: Mapping[str, Any] | None = None, mask: Callable[[str], str] = lambda text: text
    ) -> None:
        state = state or {}
        self._mask = mask
        self._values: dict[str, Any] = {key: copy(state[key]) for key in _KEYS if state.get(key)}
        self._skip: str | None = state.get("skip")
        self._has_image = bool(state.get("has_image"))
        self._has_secrets = bool(state.get("has_secrets"))
        self._changed: frozenset[str] = frozenset()

    @property
    def skip(self) -> str | None:
        """Why the task is to be skipped, None if it is not."""
        return self._skip

    @property
    def assets(self) -> Sequence[Mapping[str, Any]]:
        """The assets that were reported, each a dict with ``uri`` and ``metadata``."""
        found: Sequence[Mapping[str, Any]] = self._values.get(ASSETS_KEY, ())
        return found

    @property
    def has_secrets(self) -> bool:
        """Whether secrets were replaced in the run's result, here or in another process."""
        return self._has_secrets

    def note_secrets(self, warning: str = "") -> None:
        """Remember that secrets were replaced in the run's result; the task warns once, at its end."""
        self._has_secrets = True

    def state(self) -> dict[str, Any]:
        """Return the state with which another process continues, JSON-plain."""
        return {
            **self.xcoms(),
            "skip": self._skip,
            "has_image": self._has_image,
            "has_secrets": self._has_secrets,
        }

    def without_secrets(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        """Return a position (``Progress.to_dict()``) as Airflow may store it: it holds the run's result."""
        from dstack_core.integration import mask_progress

        shown = mask_progress(progress, self._mask)
        if shown.get("reported") is not progress.get("reported"):
            self.note_secrets()
        return shown

    def take(self, event: Reported) -> Iterator[Record]:
        """Keep a message; yield ``(logging level, text)`` for what Airflow has no page for."""
        payload = event.payload
        match event.kind:
            case "metric":
                self._set(METRICS_KEY, self._with_metrics(payload))
            case "link":
                known = self._values.get(LINKS_KEY, [])
                links = self._hidden(_with_item(known, payload, "url", "text"))
                self._set(LINKS_KEY, links)
                # An address in a log is one click away, values of XComs are folded. 100 lines at most.
                if len(links) > len(known):
                    yield logging.INFO, _link_line(links[-1])
            case "asset":
                self._set(ASSETS_KEY, self._hidden(_with_item(self.assets, payload, "uri", "metadata")))
            case "checkpoint":
                self._set(CHECKPOINT_KEY, self._hidden(_bounded(payload, "metadata")))
            case "table":
                tables = _with_table(self._values.get(TABLES_KEY, {}), payload)
                self._set(TABLES_KEY, self._hidden(tables))
            case "skip":
                reason = self._mask(payload["reason"])
                if self._skip is None:
                    # Airflow logs the reason within a group that its UI shows closed.
                    given = " ".join(reason.split()).rstrip(".") or "no reason given"
                    yield logging.INFO, f"Nothing to do: {given}. The task is skipped if the run succeeds."
                self._skip = reason
            case "image" if not self._has_image:
                self._has_image = True
                yield logging.INFO, "The run reported an image, which Airflow does not show."

    def finished(self, outcome: Outcome) -> None:
        """Keep how busy the run's machine was, which the page of the task shows."""
        if outcome.utilization is not None:
            measured = outcome.utilization.to_dict()
            self._set(UTILIZATION_KEY, {"run_name": outcome.run_name, "url": outcome.url, **measured})

    def changes(self) -> dict[str, Any]:
        """Return the XComs that changed since the last call, by key."""
        changed, self._changed = self._changed, frozenset()
        return {key: value for key, value in self.xcoms().items() if key in changed}

    def xcoms(self) -> dict[str, Any]:
        """Return all XComs, by key; a later message does not change them."""
        return {key: copy(value) for key, value in self._values.items()}

    def not_pushed(self, keys: Mapping[str, Any]) -> None:
        """Count these XComs as changed again; from any thread."""
        self._changed |= frozenset(keys)

    def _set(self, key: str, value: Any) -> None:
        self._values[key] = value
        self._changed |= {key}

    def _hidden(self, value: Any) -> Any:
        """Return a value with the secrets in its texts hidden."""
        if isinstance(value, str):
            return self._mask(value)
        if isinstance(value, Mapping):
            return {key: self._hidden(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._hidden(each) for each in value]
        return value

    def _with_metrics(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        # Changed in place: a training may report hundreds of metrics at each step.
        metrics: dict[str, Any] = self._values.get(METRICS_KEY, {})
        for key, value in payload.items():
            name = self._mask(key)
            if name != "step" and (name in metrics or len(metrics) < _MOST_METRICS):
                metrics[name] = {"value": value, "step": payload.get("step")}
        return metrics


def push_reports(ti: TaskInstanceLike, xcoms: Mapping[str, Any], reports: RunReports, log: Any) -> None:
    """Write XComs of what a run reported. Blocks; what cannot be written is logged and tried again later."""
    if left := _write(ti, xcoms, log):
        reports.not_pushed(left)


def _write(ti: TaskInstanceLike, xcoms: Mapping[str, Any], log: Any) -> dict[str, Any]:
    """Write XComs; log what could not be written, and return it."""
    left = dict(xcoms)
    try:
        for key, value in xcoms.items():
            push_xcom(ti, key, value)
            del left[key]
    except Exception as error:
        log.warning("Could not write the XComs %s: %r.", ", ".join(left), error)
    return left


class ReportPusher:
    """A push of what changed, every ten seconds at most; for the worker, whose thread may wait for it."""

    def __init__(
        self,
        push: Callable[[Mapping[str, Any], RunReports], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._push = push
        self._clock = clock
        self._next = clock()

    def offer(self, reports: RunReports, *, last: bool = False) -> None:
        """Push what changed if it is time to, or if it is the last time."""
        if not last and self._clock() < self._next:
            return
        changes = reports.changes()
        if changes:
            self._push(changes, reports)
            self._next = self._clock() + SECONDS_BETWEEN


class StatePusher:
    """A push of what a saved state has and no earlier push of this process had, every ten seconds at most.

    For the thread of a triggerer that saves states. The first push has everything: an earlier triggerer may
    have received it and not pushed it.
    """

    def __init__(self, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._pushed: dict[str, Any] = {}
        self._last = -math.inf
        self._is_urgent = False

    def hurry(self) -> None:
        """Push without a pause from now on: the run has ended."""
        self._is_urgent = True

    def push(self, ti: TaskInstanceLike, state: Mapping[str, Any]) -> None:
        """Push what is new in ``RunReports.state()``. Blocks; an error is logged, the rest comes later."""
        if not self._is_urgent and self._clock() < self._last + SECONDS_BETWEEN:
            return
        self._last = self._clock()
        new = {key: state[key] for key in _KEYS if state.get(key) and state[key] != self._pushed.get(key)}
        left = _write(ti, new, self._log)
        self._pushed.update({key: value for key, value in new.items() if key not in left})


def describe_outlets(
    context: Context, outlets: Sequence[Any], outcome: Outcome, reports: RunReports, log: Any
) -> None:
    """Write into the events of a task's outlets which run made them; an error of Airflow's is logged.

    Each asset's event gets ``run_name``, ``url``, ``metrics``, ``result`` (up to 8 KiB) and the ``metadata``
    that the run reported for its URI, unless the DAG has set them. Source: Airflow documentation, "Asset
    Definitions".
    """
    from dstack_core.integration import outcome_dict

    events: Any = context.get("outlet_events")
    assets = [outlet for outlet in outlets if getattr(outlet, "uri", None)]
    if events is None or not assets:
        return
    known: dict[str, Any] = {**outcome_dict(outcome)}
    metadata = {item["uri"]: item["metadata"] for item in reports.assets}
    extra = {name: known[name] for name in ("run_name", "url")}
    for name in ("metrics", "result"):
        if known[name] is not None and known[name] != {} and _size(known[name]) <= _ITEM_BYTES:
            extra[name] = known[name]
    for asset in assets:
        own = next((data for uri, data in metadata.items() if _is_same(uri, asset.uri)), None)
        try:
            known_extra = events[asset].extra
            for name, value in {**extra, **({"metadata": own} if own else {})}.items():
                known_extra.setdefault(name, value)
        except Exception as error:
            log.warning("Could not describe the asset %s: %r.", asset.uri, error)


def _link_line(link: Mapping[str, Any]) -> str:
    parts = ("Link", " ".join((link["text"] or "").split()), link["url"])
    return ": ".join(part for part in parts if part)


def _is_same(uri: str, other: str) -> bool:
    # Airflow normalizes the URI of an outlet.
    return uri.rstrip("/") == other.rstrip("/")


def _with_item(
    items: Sequence[Mapping[str, Any]], payload: Mapping[str, Any], key: str, detail: str
) -> list[Mapping[str, Any]]:
    """Return the items with a new one, which replaces an earlier one of that key; the oldest is dropped."""
    item = _bounded({key: payload[key], detail: payload.get(detail)}, detail)
    if _size(item) > _ITEM_BYTES:
        return list(items)
    rest = [each for each in items if each[key] != item[key]]
    return [*rest, item][-_MOST_ITEMS:]


def _bounded(payload: Mapping[str, Any], detail: str) -> dict[str, Any]:
    """Return a payload, without its detail if that is large."""
    item = dict(payload)
    if _size(item.get(detail)) > _ITEM_BYTES:
        item[detail] = None
    return item


def _with_table(tables: Mapping[str, Any], payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables with a new one of up to 100 rows; rows and older tables give way to the limit."""
    rows = payload["rows"][:_MOST_ITEMS]
    columns, total = payload["columns"], len(payload["rows"])
    while rows and _size([columns, rows]) > _TABLES_BYTES:
        rows = rows[: len(rows) // 2]
    new: dict[str, Any] = {"columns": columns, "rows": rows}
    if len(rows) < total:
        new["rows_left_out"] = total - len(rows)
    result = {name: table for name, table in tables.items() if name != payload["name"]}
    result[payload["name"]] = new
    while result and _size(result) > _TABLES_BYTES:
        del result[next(iter(result))]
    return result


def _size(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))
