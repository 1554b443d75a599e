"""Runs as rows of a table: what is running, and what it has cost.

The command lines of all hosts show the same columns, so they are made here; a host prints them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from io import StringIO
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from dstack_core import clock
from dstack_core._flow.costs import cost_query
from dstack_core.errors import ConfigurationError, DstackError
from dstack_core.integration.command_line import PLAIN, TextStyle, text_table
from dstack_core.integration.doctor_network import Finding, describe_finding
from dstack_core.models.costs import CostRow
from dstack_core.models.durations import format_duration
from dstack_core.models.money import format_usd

if TYPE_CHECKING:
    from dstack_core._run_base import RunBase
    from dstack_core.client import Client
    from dstack_core.run import Run

    AnyRun: TypeAlias = RunBase[Any]


# The help of ``--by`` in commands.
COST_KEYS = "owner, dag, flow, task, user, gpu, day, name, status or tag:KEY; several with commas"


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run in a list.

    Attributes:
        name: The run's name.
        status: Its status.
        submitted_at: When it was submitted (aware).
        cost: What it has cost, in USD.
        owner: What owns it, such as ``airflow:train/manual__1/fit/1of3``; empty for a run without a marker.
        message: ``held for a shell`` if its container is held after a failure, else the server's detail on
            the status; empty without one.
    """

    name: str
    status: str
    submitted_at: datetime
    cost: float
    owner: str
    message: str


def is_held_for_a_shell(run: Run) -> bool:
    """Return whether a run's container is held after a failure; reads its log, False if that cannot be read.

    Only a running run with ``debug_on_failure`` costs a request.
    """
    if not run.holds_on_failure or run.last_status.is_before_start or run.last_status.is_ending:
        return False
    try:
        return run.is_held()
    except DstackError:
        return False


def run_rows(runs: Iterable[AnyRun], *, is_held: Callable[[Any], bool] | None = None) -> list[RunRow]:
    """Return the rows for runs, in their order.

    Args:
        runs: The runs.
        is_held: Whether a run is held for a shell, such as ``is_held_for_a_shell``. Default: not checked.
    """
    return [
        RunRow(
            run.name,
            run.raw_status,
            run.submitted_at,
            run.cost,
            run.marker if run.marker and ":" in run.marker else "",
            _message(run, is_held),
        )
        for run in runs
    ]


def _message(run: AnyRun, is_held: Callable[[Any], bool] | None) -> str:
    if is_held is not None and is_held(run):
        return "held for a shell"
    return run.status_message if run.status_message and run.status_message != run.raw_status else ""


def cost_rows(
    runs: Iterable[AnyRun],
    *,
    by: str | Sequence[str] = "owner",
    since: datetime | str | int | None = None,
    until: datetime | str | int | None = None,
    now: datetime | None = None,
) -> list[CostRow]:
    """Return what runs have cost in groups, the most expensive first; ``client.costs`` reads them, too.

    Args:
        runs: The runs, such as ``client.runs.list(all=True)``.
        by: As for ``client.costs``.
        since: Only runs submitted from then on: a ``datetime``, a date, or a duration until ``now`` (seconds,
            or a text such as ``"7d"``). Default: all.
        until: Only runs submitted before then, likewise. Default: all.
        now: The time that durations count back from (aware). Default: now.

    Returns:
        The groups. Runs without an owner or the tag are in the group ``"-"``.

    Raises:
        ConfigurationError: ``by``, ``since`` or ``until`` is wrong.

    Example:
        ``cost_rows(client.runs.list(all=True), by="tag:team", since="30d")``
    """
    query = cost_query(by, since, until, now or clock.now())
    for run in runs:
        query.add(run._snapshot)
    return query.rows()


def show_runs(
    client: Client,
    *,
    all: bool = False,
    owner: str = "",
    owners: str = "",
    as_json: bool = False,
    indent: int | None = 2,
    style: TextStyle = PLAIN,
) -> str:
    """Return the runs of a project as a command shows them: a table, one sentence without runs, or JSON.

    Args:
        client: The client of the project.
        all: Also finished runs.
        owner: Only runs whose marker begins with this text, such as ``"airflow:"``.
        owners: What these runs are called if there is not one, such as ``" of Airflow tasks"``.
        as_json: Return JSON, a list of ``RunRow``.
        indent: The indentation of the JSON; None: one line.
        style: How the table is written. Default: without colors, as wide as it is.

    Raises:
        ProjectNotFoundError: The server has no such project.
        ServerError: The other server errors.
    """
    shown = [
        run
        for run in client.runs.list(all=all)
        if (all or run.last_status.is_active) and (run.marker or "").startswith(owner)
    ]
    rows = run_rows(shown, is_held=is_held_for_a_shell)
    if as_json:
        return rows_json(rows, indent=indent)
    if rows:
        return run_table(rows, style=style)
    return f"Project {client.project} has no {'runs' if all else 'active runs'}{owners}."


def show_costs(
    client: Client,
    *,
    by: str | Sequence[str],
    since: datetime | str | int | None,
    until: datetime | str | int | None = None,
    marker_prefix: str | None = None,
    tags: Mapping[str, str] | None = None,
    as_json: bool = False,
    as_csv: bool = False,
    indent: int | None = 2,
    style: TextStyle = PLAIN,
) -> str:
    """Return what the runs of a project have cost as a command shows it: ``client.costs`` as text or data.

    The table has two decimals, below 1 USD four; its total is the sum of the exact costs, not of what is
    shown. CSV and JSON have the exact costs. Raises the errors of ``client.costs``, and
    ``ConfigurationError`` for both at once.
    """
    if as_csv and as_json:
        raise ConfigurationError("output: expected text with --csv, got json. Choose one of the two.")
    rows = client.costs(by=by, since=since, until=until, marker_prefix=marker_prefix, tags=tags)
    if as_csv:
        return cost_csv(rows, by)
    return rows_json(rows, indent=indent) if as_json else cost_table(rows, style)


def cost_csv(rows: Sequence[CostRow], by: str | Sequence[str]) -> str:
    """Return the rows as CSV with a header: the keys of ``by``, then ``runs`` and ``cost_usd``."""
    keys = [each.strip() for each in by.split(",")] if isinstance(by, str) else list(by)
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "runs", "cost_usd"])
    writer.writerows([*(row.keys[key] for key in keys), row.runs, f"{row.cost:.4f}"] for row in rows)
    return text.getvalue().rstrip("\n")


def show_findings(
    findings: Iterable[Finding], stream: IO[str], *, as_json: bool = False, indent: int | None = 2
) -> int:
    """Write each finding as it is made, or all of them as JSON; return 1 if something does not work, else 0.

    Text has the style of the stream (``TextStyle.of``).
    """
    found, style = [], TextStyle.of(stream)
    for each in findings:
        found.append(each)
        if not as_json:
            stream.write(f"{describe_finding(each, style)}\n")
            # A check may take seconds, and its finding is seen before the next one begins.
            stream.flush()
    if as_json:
        stream.write(f"{rows_json(found, indent=indent)}\n")
        stream.flush()
    return 1 if any(each.state == "error" for each in found) else 0


def rows_json(rows: Iterable[Any], *, indent: int | None = 2) -> str:
    """Return dataclasses such as ``RunRow`` as a list in JSON; times are written in ISO 8601."""
    return json.dumps([asdict(row) for row in rows], indent=indent, default=_json_value)


def _json_value(value: object) -> object:
    if isinstance(value, Decimal):
        return float(value)
    return value.isoformat() if isinstance(value, datetime) else str(value)


def run_table(rows: Sequence[RunRow], now: datetime | None = None, style: TextStyle = PLAIN) -> str:
    """Return the rows as a table of text, ages counted from ``now`` (aware; default: now)."""
    at = now or clock.now()
    cells = [
        (
            row.name,
            row.status,
            format_duration(max(0.0, (at - row.submitted_at).total_seconds())),
            format_usd(row.cost),
            row.owner or "-",
            row.message,
        )
        for row in rows
    ]
    head = ("NAME", "STATUS", "AGE", "COST", "OWNER", "MESSAGE")
    return text_table(head, cells, style, states=(1,), whole=(0, 1, 2, 3))


def cost_table(rows: Sequence[CostRow], style: TextStyle = PLAIN) -> str:
    """Return the rows as a table of text, with their sum."""
    cells = [(row.group, str(row.runs), format_usd(row.cost)) for row in rows]
    spent = sum((row.cost for row in rows), Decimal(0))
    total = ("TOTAL", str(sum(row.runs for row in rows)), format_usd(spent))
    return text_table(("GROUP", "RUNS", "COST"), [*cells, total], style, whole=(1, 2))
