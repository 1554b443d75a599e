"""A budget of a flow run: a run that does not fit any more is refused, skipped, or waits for approval."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

import prefect_dstack.budgets as budgets
from dstack_core import ConfigurationError, Task
from dstack_core.integration import BudgetSpentError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task
from prefect_dstack.budgets import DstackBudget

from .support import all_runs, until
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")

SHORT = Task(commands=["sleep 1"])


def test_a_run_that_does_not_fit_is_refused(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def spending() -> None:
        budget = DstackBudget(0.05, credentials=credentials)
        assert budget.allows(planned=0.05)
        run_task(SHORT, credentials, max_cost=0.05, **FAST)
        assert budget.allows(planned=0.04)
        budget.allows(planned=0.05)

    with pytest.raises(
        BudgetSpentError, match=r"^Of the budget of 0\.05 USD, 0\.000.* are spent by 1 run, and"
    ):
        spending()
    assert len(all_runs(dstack)) == 1


def test_a_run_that_does_not_fit_is_skipped_in_async(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    async def spending() -> list[bool]:
        budget = DstackBudget(0.05, when_spent="skip", credentials=credentials)
        await arun_task(SHORT, credentials, max_cost=0.05, **FAST)
        return [await budget.aallows(planned=0.04), await budget.aallows(planned=0.05)]

    import asyncio

    assert asyncio.run(spending()) == [True, False]


def test_a_run_that_does_not_fit_waits_for_approval(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "_PAUSE_POLL_SECONDS", 1)
    ids: list[Any] = []

    @flow
    def spending() -> bool:
        ids.append(flow_run.id)
        return DstackBudget(0.05, when_spent="approve", credentials=credentials).allows(planned=0.06)

    def approve() -> None:
        with get_client(sync_client=True) as api:

            def is_paused() -> bool:
                state = api.read_flow_run(ids[0]).state if ids else None
                return state is not None and state.is_paused()

            until(is_paused, what="a paused flow run")
            api.resume_flow_run(ids[0])

    person = threading.Thread(target=approve)
    person.start()
    assert spending()
    person.join()


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ConfigurationError, match=r"^max_cost: expected USD above 0"):
        DstackBudget(0)
    with pytest.raises(ConfigurationError, match=r"^when_spent: expected one of 'fail', 'skip', 'approve'"):
        DstackBudget(5, when_spent="ask")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="expected a flow, got code outside of one"):
        DstackBudget(5).allows()
