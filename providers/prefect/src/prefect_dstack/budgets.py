"""A budget for a flow run: before a run is submitted, the flow asks whether it still fits."""

from __future__ import annotations

import inspect
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias

from prefect.context import FlowRunContext
from prefect.flow_runs import pause_flow_run
from prefect.logging import get_run_logger

from prefect_dstack._names import flow_run_marker_prefix
from prefect_dstack.credentials import CredentialsLike, aload, load, open_async_client, open_client

if TYPE_CHECKING:
    from dstack_core.integration import BudgetState

__all__ = ["DstackBudget"]

WhenSpent: TypeAlias = Literal["fail", "skip", "approve"]
_WHEN_SPENT = ("fail", "skip", "approve")
# The clocks of Prefect and of the dstack server may differ by this much.
_CLOCKS = timedelta(hours=1)
# Seconds between two questions to the Prefect server whether a paused flow run was resumed.
_PAUSE_POLL_SECONDS = 5


class _Owner(NamedTuple):
    """The runs of a flow run: how their markers begin, and when the first can have been submitted."""

    marker_prefix: str
    since: datetime | None


class DstackBudget:
    """A budget that the dstack runs of a flow run share.

    ``allows`` adds up what they have cost, of all tasks and executions of the flow run, and what active ones
    with a ``max_cost`` may still cost, from the dstack server. Call it in the flow, before each task.

    Args:
        max_cost: What all dstack runs of the flow run may cost together, in USD.
        when_spent: What happens to a run that does not fit: ``"fail"`` raises ``BudgetSpentError``,
            ``"skip"`` returns False, ``"approve"`` pauses the flow run until a person resumes it. Default
            ``"fail"``.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``. Default: None.
        approval_timeout: Seconds to wait for an approval, then the flow run fails. Default: 86400.

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
        self.when_spent = when_spent
        self.credentials = credentials
        self.approval_timeout = approval_timeout

    def allows(self, planned: float | None = None) -> bool:
        """Return whether the next run may be submitted; with ``"approve"``, wait for that.

        Args:
            planned: What the next run may cost, in USD: its ``max_cost``. Default: nothing, so that it fits
                while anything is left.

        Raises:
            BudgetSpentError: It does not fit, and ``when_spent`` is ``"fail"``.
            ConfigurationError: An amount is wrong, or this is not called in a flow.
            ServerError: The server errors.
        """
        from dstack_core.integration import read_budget

        owner = _owner()
        with open_client(load(self.credentials)) as client:
            state = read_budget(
                client, self.max_cost, planned=planned, marker_prefix=owner.marker_prefix, since=owner.since
            )
        if self._is_settled(state):
            return state.fits
        self._pause()
        return True

    async def aallows(self, planned: float | None = None) -> bool:
        """Return whether the next run may be submitted: the async twin of ``allows``."""
        from dstack_core.integration import aread_budget

        owner = _owner()
        async with open_async_client(await aload(self.credentials)) as client:
            state = await aread_budget(
                client, self.max_cost, planned=planned, marker_prefix=owner.marker_prefix, since=owner.since
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

    def _pause(self) -> Any:
        return pause_flow_run(timeout=self.approval_timeout, poll_interval=_PAUSE_POLL_SECONDS)


def _owner() -> _Owner:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        _refuse("DstackBudget: expected a flow, got code outside of one. Call allows() in the flow.")
    created = context.flow_run.created
    return _Owner(
        flow_run_marker_prefix(str(context.flow_run.id)), None if created is None else created - _CLOCKS
    )


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
