"""Runs as rows of a table: what is running, and what it has cost.

The command lines of all hosts show the same columns, so they are made here; a host prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from dstack_core.errors import ConfigurationError
from dstack_core.integration.outcome_text import format_usd
from dstack_core.models.durations import format_duration
from dstack_core.models.options import duration_seconds

if TYPE_CHECKING:
    from dstack_core._run_base import RunBase

    AnyRun: TypeAlias = RunBase[Any]


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run in a list.

    Attributes:
        name: The run's name.
        status: Its status.
        submitted_at: When it was submitted (aware).
        cost: What it has cost, in USD.
        owner: What owns it, such as ``airflow:train/manual__1/fit/1of3``; empty for a run without a marker.
        message: The server's detail on the status; empty without one.
    """

    name: str
    status: str
    submitted_at: datetime
    cost: float
    owner: str
    message: str


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a group of runs has cost: its name, the number of runs, and USD."""

    group: str
    runs: int
    cost: float


def run_rows(runs: Iterable[AnyRun]) -> list[RunRow]:
    """Return the rows for runs, in their order."""
    return [
        RunRow(
            run.name,
            run.raw_status,
            run.submitted_at,
            run.cost,
            run.marker if run.marker and ":" in run.marker else "",
            run.status_message if run.status_message and run.status_message != run.raw_status else "",
        )
        for run in runs
    ]


def cost_rows(
    runs: Iterable[AnyRun], *, by: str = "owner", since: str | int | None = None, now: datetime | None = None
) -> list[CostRow]:
    """Return what runs have cost in groups, the most expensive first.

    Args:
        runs: The runs, such as ``client.runs.list(all=True)``.
        by: ``"owner"`` (the DAG of an Airflow task, the kind of other owners), ``"name"``, ``"status"``,
            ``"day"`` (of the submission, UTC), or ``"tag:KEY"``.
        since: Only runs submitted within this duration: seconds, or a text such as ``"7d"``. Default: all.
        now: The time ``since`` counts back from (aware). Default: now.

    Returns:
        The groups. Runs without an owner or the tag are in the group ``"-"``.

    Raises:
        ConfigurationError: ``by`` or ``since`` is wrong.

    Example:
        ``cost_rows(client.runs.list(all=True), by="tag:team", since="30d")``
    """
    key = _group_of(by)
    oldest = None if since is None else (now or datetime.now(UTC)) - timedelta(seconds=_seconds(since))
    groups: dict[str, list[float]] = {}
    for run in runs:
        if oldest is None or run.submitted_at >= oldest:
            groups.setdefault(key(run) or "-", []).append(run.cost)
    rows = [CostRow(group, len(costs), sum(costs)) for group, costs in groups.items()]
    return sorted(rows, key=lambda row: (-row.cost, row.group))


def _group_of(by: str) -> Callable[[AnyRun], str]:
    kind, _, tag = by.partition(":")
    if kind == "tag" and tag:
        return lambda run: run.tags.get(tag, "")
    groups: dict[str, Callable[[AnyRun], str]] = {
        "owner": lambda run: (run.marker or "").partition("/")[0] if ":" in (run.marker or "") else "",
        "name": lambda run: run.name,
        "status": lambda run: run.raw_status,
        "day": lambda run: f"{run.submitted_at.astimezone(UTC):%Y-%m-%d}",
    }
    if by not in groups:
        raise ConfigurationError(f"by: expected {', '.join(groups)} or tag:KEY, got {by!r}.")
    return groups[by]


def _seconds(since: str | int) -> float:
    try:
        return duration_seconds(since)
    except (TypeError, ValueError):
        raise ConfigurationError(f"since: expected a duration such as 7d or 12h, got {since!r}.") from None


def run_table(rows: Sequence[RunRow], now: datetime | None = None) -> str:
    """Return the rows as a table of text, ages counted from ``now`` (aware; default: now)."""
    at = now or datetime.now(UTC)
    cells = [
        (
            row.name,
            row.status,
            format_duration(max(0.0, (at - row.submitted_at).total_seconds())),
            format_usd(row.cost),
            _short(row.owner) or "-",
            row.message,
        )
        for row in rows
    ]
    return text_table(("NAME", "STATUS", "AGE", "COST", "OWNER", "MESSAGE"), cells)


def cost_table(rows: Sequence[CostRow]) -> str:
    """Return the rows as a table of text, with their sum."""
    cells = [(_short(row.group), str(row.runs), format_usd(row.cost)) for row in rows]
    total = ("TOTAL", str(sum(row.runs for row in rows)), format_usd(sum(row.cost for row in rows)))
    return text_table(("GROUP", "RUNS", "COST"), [*cells, total])


# An owner names a DAG, a DAG run and a task, each of up to 250 characters; a terminal has 80 to 200.
_LONGEST_CELL = 48


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 1]}…"


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table with two blanks between its columns, one line for each row."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    shown = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *lines)
    ]
    return "\n".join(line.rstrip() for line in shown)
