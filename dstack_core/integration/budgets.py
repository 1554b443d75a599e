"""A budget that the runs of one owner share, such as those of a DAG run.

What was spent is read from the server, so that every process sees the same, and a retry or a restart does not
begin at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from dstack_core._flow.costs import read_pages, submitted_at
from dstack_core.models.budgets import BudgetState
from dstack_core.models.cost_limits import check_max_cost

if TYPE_CHECKING:
    from dstack_core._flow.steps import Flow
    from dstack_core._operations import Operations
    from dstack_core._wire.runs import RunSnapshot
    from dstack_core.aio import AsyncClient
    from dstack_core.client import Client


def read_budget(
    client: Client,
    max_cost: Any,
    *,
    marker_prefix: str | tuple[str, ...],
    planned: Any = None,
    since: datetime | None = None,
) -> BudgetState:
    """Return how much of a budget is spent by the runs of an owner.

    A run that is submitted between this and the caller's own submission is not seen: two callers at the same
    moment may both find that they fit.

    Args:
        client: The client of the runs' project.
        max_cost: What they may cost together, in USD: a number, a ``Decimal`` or a text.
        marker_prefix: How the markers of the owner's runs begin, such as ``"airflow:train/manual__1/"``; a
            tuple if there are several beginnings.
        planned: What the next run may cost, in USD. Default: nothing, so that it fits while anything is left.
        since: No run of the owner is older than this (aware). Default: all runs of the project are read.

    Raises:
        ConfigurationError: An amount is wrong; nothing was sent.
        ServerError: The server errors.

    Example:
        ``read_budget(client, 50, marker_prefix="airflow:train/manual__1/", planned=20).raise_for_status()``
    """
    from dstack_core import _drive

    flow = _read(client._operations, _Sum.of(max_cost, planned, marker_prefix, since))
    return _drive.run(flow, client._transport)


async def aread_budget(
    client: AsyncClient,
    max_cost: Any,
    *,
    marker_prefix: str | tuple[str, ...],
    planned: Any = None,
    since: datetime | None = None,
) -> BudgetState:
    """Return how much of a budget is spent: the twin of ``read_budget``, which has the details.

    Args:
        client: The client of the runs' project.
        max_cost: What they may cost together, in USD.
        marker_prefix: How the markers of the owner's runs begin; a tuple if there are several beginnings.
        planned: What the next run may cost, in USD.
        since: No run of the owner is older than this (aware).

    Raises:
        ConfigurationError: An amount is wrong; nothing was sent.
        ServerError: The server errors.
    """
    from dstack_core import _adrive

    flow = _read(client._operations, _Sum.of(max_cost, planned, marker_prefix, since))
    return await _adrive.arun(flow, client._transport)


def _read(operations: Operations, found: _Sum) -> Flow[BudgetState]:
    yield from operations.retried(read_pages(operations.api, found))
    return BudgetState(found.max_cost, found.spent, found.reserved, found.planned, found.runs)


@dataclass(slots=True)
class _Sum:
    """What was added up so far."""

    max_cost: Decimal
    planned: Decimal
    marker_prefix: str | tuple[str, ...]
    since: datetime | None
    spent: Decimal = Decimal(0)
    reserved: Decimal = Decimal(0)
    runs: int = 0

    @classmethod
    def of(
        cls, max_cost: Any, planned: Any, marker_prefix: str | tuple[str, ...], since: datetime | None
    ) -> _Sum:
        """Return an empty sum; raises ``ConfigurationError``."""
        amount = Decimal(str(check_max_cost(max_cost)))
        of_next = Decimal(0) if planned is None else Decimal(str(check_max_cost(planned, "planned")))
        return cls(amount, of_next, marker_prefix, since)

    def add(self, run: RunSnapshot) -> None:
        """Add a run of the owner."""
        if not (run.marker or "").startswith(self.marker_prefix):
            return
        cost, limit = Decimal(str(run.cost)), run.cost_limit
        self.runs += 1
        self.spent += cost
        if run.is_active and limit is not None:
            self.reserved += max(Decimal(0), Decimal(str(limit.max_cost)) - cost)

    def is_older(self, run: RunSnapshot) -> bool:
        """Return whether no older run counts."""
        return self.since is not None and submitted_at(run) < self.since
