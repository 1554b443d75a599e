"""A budget for a flow run: before a run is submitted, the flow asks whether it still fits."""

from __future__ import annotations

import asyncio
import inspect
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias

from prefect.context import FlowRunContext
from prefect.flow_runs import pause_flow_run
from prefect.logging import get_run_logger

from prefect_dstack._checks import check_seconds
from prefect_dstack._names import flow_run_marker_prefix, worker_marker_prefix
from prefect_dstack._subflows import read_subflows
from prefect_dstack.credentials import CredentialsLike, aload, load, open_async_client, open_client

if TYPE_CHECKING:
    from uuid import UUID

    from dstack_core.integration import BudgetState

__all__ = ["DstackBudget"]

WhenSpent: TypeAlias = Literal["fail", "skip", "approve"]
_WHEN_SPENT = ("fail", "skip", "approve")
# The clocks of Prefect and of the dstack server may differ by this much.
_CLOCKS = timedelta(hours=1)
# Seconds between two questions to the Prefect server whether a paused flow run was resumed.
_PAUSE_POLL_SECONDS = 5
# Above this a pause is a mistake, such as milliseconds; far above it Prefect cannot count.
_LONGEST_PAUSE = 365 * 86400


class _Owner(NamedTuple):
    """The flow run whose runs count, and when the first of them can have been submitted."""

    flow_run_id: UUID
    since: datetime | None

    def marker_prefix(self) -> tuple[str, ...]:
        """Return how the markers of its runs begin; reads the subflows from the Prefect server."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as api:
            flow_run_ids = [self.flow_run_id, *read_subflows(api, self.flow_run_id)]
        prefixes = [(flow_run_marker_prefix(str(one)), worker_marker_prefix(one)) for one in flow_run_ids]
        return tuple(prefix for both in prefixes for prefix in both)


class DstackBudget:
    """A budget that the dstack runs of a flow run share.

    ``allows`` adds up what they have cost, of all tasks and executions of the flow run, and what active ones
    with a ``max_cost`` may still cost, from the dstack server. Call it in the flow, before each task.

    The runs of subflows count, also of those that ``run_deployment`` starts, and so do the machines of
    ``dstack`` work pools on which the flow run and its subflows execute. A budget that a flow makes is that
    of its flow run, also where it is passed to a subflow. One made outside of a flow is that of the flow run
    that calls ``allows``.

    Args:
        max_cost: What all dstack runs of the flow run may cost together, in USD.
        when_spent: What happens to a run that does not fit: ``"fail"`` raises ``BudgetSpentError``,
            ``"skip"`` returns False, ``"approve"`` pauses the flow run until a person resumes it. Default
            ``"fail"``.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``. Default: None.
        approval_timeout: Seconds to wait for an approval, then the flow run fails; above 0, at most a year.
            Default: 86400.

    Raises:
        ConfigurationError: An argument is wrong.

    Example::

        @flow
        def train() -> None:
            budget = DstackBudget(max_cost=50, when_spent="skip")
            if budget.allows(planned=20):
                run_task(configuration, max_cost=20)

    Source: Prefect documentation, "Pause and resume flow runs".
    """

    def __init__(
        self,
        max_cost: float,
        *,
        when_spent: WhenSpent = "fail",
        credentials: CredentialsLike = None,
        approval_timeout: int = 86400,
    ) -> None:
        from dstack_core.integration import check_max_cost

        self.max_cost = check_max_cost(max_cost)
        if when_spent not in _WHEN_SPENT:
            known = ", ".join(map(repr, _WHEN_SPENT))
            _refuse(f"when_spent: expected one of {known}, got {when_spent!r}.")
        check_seconds(approval_timeout=approval_timeout)
        if approval_timeout > _LONGEST_PAUSE:
            _refuse(
                f"approval_timeout: expected at most {_LONGEST_PAUSE} seconds (a year), got "
                f"{approval_timeout!r}."
            )
        self.when_spent = when_spent
        self.credentials = credentials
        self.approval_timeout = approval_timeout
        self._made_in = _current_owner()

    def allows(self, planned: float | None = None) -> bool:
        """Return whether the next run may be submitted; with ``"approve"``, wait for that.

        Args:
            planned: What the next run may cost, in USD: its ``max_cost``. Default: nothing, so that it fits
                while anything is left.

        Raises:
            BudgetSpentError: It does not fit, and ``when_spent`` is ``"fail"``.
            ConfigurationError: An amount is wrong, or this is not called in a flow.
            ServerError: The server errors.
            Exception: What Prefect's client raises when the subflows are read.
        """
        from dstack_core.integration import read_budget

        owner = self._owner()
        prefix = owner.marker_prefix()
        with open_client(load(self.credentials)) as client:
            state = read_budget(
                client, self.max_cost, planned=planned, marker_prefix=prefix, since=owner.since
            )
        if self._is_settled(state):
            return state.fits
        self._pause()
        return True

    async def aallows(self, planned: float | None = None) -> bool:
        """Return whether the next run may be submitted: the async twin of ``allows``."""
        from dstack_core.integration import aread_budget

        owner = self._owner()
        prefix = await asyncio.to_thread(owner.marker_prefix)
        async with open_async_client(await aload(self.credentials)) as client:
            state = await aread_budget(
                client, self.max_cost, planned=planned, marker_prefix=prefix, since=owner.since
            )
        if self._is_settled(state):
            return state.fits
        paused = self._pause()
        if inspect.isawaitable(paused):
            await paused
        return True

    def _is_settled(self, state: BudgetState) -> bool:
        """Log what is spent, and return whether the next run needs no approval."""
        log = get_run_logger()
        if state.fits:
            log.info("%s", state.text)
            return True
        if self.when_spent == "fail":
            state.raise_for_status()
        if self.when_spent == "skip":
            log.warning("%s The run is skipped.", state.text)
            return True
        log.warning("%s Resume the flow run to approve, or cancel it.", state.text)
        return False

    def _owner(self) -> _Owner:
        owner = _current_owner()
        if owner is None:
            _refuse("DstackBudget: expected a flow, got code outside of one. Call allows() in the flow.")
        return self._made_in or owner

    def _pause(self) -> Any:
        return pause_flow_run(timeout=self.approval_timeout, poll_interval=_PAUSE_POLL_SECONDS)


def _current_owner() -> _Owner | None:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None
    created = context.flow_run.created
    return _Owner(context.flow_run.id, None if created is None else created - _CLOCKS)


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
