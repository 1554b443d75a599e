"""Add up what the runs of a project have cost, as the server counts it.

A project may have years of runs. Pages are read newest first, each run is added to its group and dropped, and
reading ends with the first page that is older than what is wanted. Replaced and deleted runs count too: their
machines were paid for. The server's numbers have four decimals, which are added up exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Protocol

from dstack_core._flow.steps import Op, call
from dstack_core._wire.api import PAGE_SIZE, Api
from dstack_core._wire.http_messages import time_of
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import ConfigurationError, ProtocolError
from dstack_core.models.costs import CostRow
from dstack_core.models.options import duration_seconds

NONE = "-"
# A DAG run's id may hold slashes where the Airflow allows it; the ids of DAGs and tasks hold none.
_AIRFLOW = re.compile(r"airflow:(?P<dag>[^/]+)/.+/(?P<task>[^/\[]+)(?:\[\d+\])?/\d+of\d+#")


def _owner(run: RunSnapshot) -> str:
    return (run.marker or "").partition("/")[0] if ":" in (run.marker or "") else ""


def _of_airflow(run: RunSnapshot, part: str) -> str:
    """Return a part of the marker of an Airflow task's run, else the tag, which is in lowercase."""
    found = _AIRFLOW.match(run.marker or "")
    return found[part] if found else run.tags.get(f"airflow-{part}", "")


def _gpu(run: RunSnapshot) -> str:
    """Return the GPU of the run's first machine that has one; of several attempts, the last counts."""
    machines = (each.machine for job in run.jobs for each in reversed(job.submissions))
    return next((one.hardware.gpu for one in machines if one.hardware and one.hardware.gpu), "")


_GROUPS: dict[str, Callable[[RunSnapshot], str]] = {
    "owner": _owner,
    "dag": lambda run: _of_airflow(run, "dag"),
    "flow": lambda run: run.tags.get("prefect-flow", ""),
    "task": lambda run: _of_airflow(run, "task") or run.tags.get("prefect-task", ""),
    "user": lambda run: run.user,
    "gpu": _gpu,
    "name": lambda run: run.name,
    "status": lambda run: run.raw_status,
    "day": lambda run: f"{time_of(run.submitted_at).astimezone(UTC):%Y-%m-%d}",
}


@dataclass(slots=True)
class CostQuery:
    """Which runs count, how they are grouped, and what was added up so far."""

    by: tuple[str, ...]
    since: datetime | None
    until: datetime | None
    marker_prefix: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    _sums: dict[tuple[str, ...], tuple[int, Decimal]] = field(default_factory=dict)

    def add(self, run: RunSnapshot) -> None:
        """Add a run if it counts."""
        at = time_of(run.submitted_at)
        if (self.since is not None and at < self.since) or (self.until is not None and at >= self.until):
            return
        if not (run.marker or "").startswith(self.marker_prefix):
            return
        if any(run.tags.get(key) != value for key, value in self.tags.items()):
            return
        group = tuple(_group_of(key)(run) or NONE for key in self.by)
        runs, cost = self._sums.get(group, (0, Decimal(0)))
        # The text of a float is the shortest that means it, and so the server's own.
        self._sums[group] = runs + 1, cost + Decimal(str(run.cost))

    def is_older(self, run: RunSnapshot) -> bool:
        """Return whether a run, and so all that follow it, is too old to count."""
        return self.since is not None and time_of(run.submitted_at) < self.since

    def rows(self) -> list[CostRow]:
        """Return the groups, the most expensive first."""
        rows = [
            CostRow(" / ".join(group), runs, cost, dict(zip(self.by, group, strict=True)))
            for group, (runs, cost) in self._sums.items()
        ]
        return sorted(rows, key=lambda row: (-row.cost, row.group))


def cost_query(
    by: str | Sequence[str],
    since: datetime | str | int | None,
    until: datetime | str | int | None,
    now: datetime,
    *,
    marker_prefix: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> CostQuery:
    """Return the query; raises ``ConfigurationError``."""
    keys: list[Any] = [by]
    if isinstance(by, str):
        keys = [each.strip() for each in by.split(",")]
    elif isinstance(by, Sequence):
        keys = list(by)
    for key in keys or [""]:
        _group_of(key)
    return CostQuery(
        tuple(dict.fromkeys(keys)),
        _moment("since", since, now),
        _moment("until", until, now),
        marker_prefix or "",
        tags or {},
    )


def _group_of(by: object) -> Callable[[RunSnapshot], str]:
    if isinstance(by, str):
        kind, _, tag = by.partition(":")
        if kind == "tag" and tag:
            return lambda run: run.tags.get(tag, "")
        if by in _GROUPS:
            return _GROUPS[by]
    raise ConfigurationError(f"by: expected {', '.join(_GROUPS)} or tag:KEY, got {by!r}.")


def _moment(name: str, given: datetime | str | int | None, now: datetime) -> datetime | None:
    """Return the moment of a duration until now, a date or a time; dates are of UTC."""
    if given is None:
        return None
    try:
        if not isinstance(given, datetime):
            return now - timedelta(seconds=duration_seconds(given))
    except (TypeError, ValueError, KeyError, OverflowError):
        try:
            given = datetime.fromisoformat(str(given))
        except ValueError:
            raise ConfigurationError(
                f"{name}: expected a duration such as 7d or 12h, or a date such as 2026-11-30, got {given!r}."
            ) from None
    return given if given.tzinfo is not None else given.replace(tzinfo=UTC)


def submitted_at(run: RunSnapshot) -> datetime:
    """Return when a run was submitted."""
    return time_of(run.submitted_at)


class Adder(Protocol):
    """What adds up runs, newest first."""

    def add(self, run: RunSnapshot, /) -> None:
        """Add a run if it counts."""

    def is_older(self, run: RunSnapshot, /) -> bool:
        """Return whether a run, and so all that follow it, is too old to count."""


def read_costs(api: Api, query: CostQuery) -> Op[list[CostRow]]:
    """Return what the project's runs have cost. Raises ``ProjectNotFoundError``."""
    yield from read_pages(api, query)
    return query.rows()


def read_pages(api: Api, adder: Adder) -> Op[None]:
    """Read the project's runs page by page, as far back as they count. Raises ``ProjectNotFoundError``."""
    last: RunSnapshot | None = None
    while True:
        page = yield from call(api.list_runs(only_active=False, after=last))
        if last is not None and page and page[-1].id == last.id:
            raise ProtocolError(f"{api.server_url} gives the same page of runs again and again")
        for run in page:
            adder.add(run)
        if last is None and not page:
            # Servers of every version list no runs for a project that they do not have.
            yield from call(api.get_project(api.project))
        if len(page) < PAGE_SIZE or adder.is_older(page[-1]):
            return
        last = page[-1]
