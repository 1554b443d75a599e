"""A budget of a flow run: a run that does not fit any more is refused, skipped, or waits for approval."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

import prefect_dstack.budgets as budgets
from dstack_core import ConfigurationError, Task
from dstack_core.integration import BudgetSpentError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task
from prefect_dstack._names import worker_marker_prefix
from prefect_dstack._subflows import read_subflows
from prefect_dstack.budgets import DstackBudget

from .support import all_runs, until
from .ways import FAST

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

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


def test_runs_of_subflows_count(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def inner() -> None:
        run_task(SHORT, credentials, **FAST)

    @flow
    def middle() -> None:
        inner()

    @flow
    def spending() -> tuple[bool, bool]:
        budget = DstackBudget(0.0001, when_spent="skip", credentials=credentials)
        before = budget.allows()
        middle()
        return before, budget.allows()

    assert spending() == (True, False)


def test_a_budget_passed_to_a_subflow_counts_the_runs_of_its_flow(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    async def inner(passed: DstackBudget) -> list[bool]:
        own = DstackBudget(0.0001, when_spent="skip", credentials=credentials)
        return [await passed.aallows(), await own.aallows(), await shared.aallows()]

    shared = DstackBudget(0.0001, when_spent="skip", credentials=credentials)

    @flow
    async def spending() -> list[bool]:
        budget = DstackBudget(0.0001, when_spent="skip", credentials=credentials)
        await arun_task(SHORT, credentials, **FAST)
        return await inner(budget)

    import asyncio

    # The subflow has spent nothing itself: its own budget, and one made outside of a flow, are untouched.
    assert asyncio.run(spending()) == [False, True, True]


def test_all_subflows_are_read_from_a_server_that_returns_few_at_once() -> None:
    root, children = uuid4(), [uuid4() for _ in range(5)]
    grandchild = uuid4()

    class Api:
        def read_flow_runs(self, *, flow_run_filter: Any, sort: Any, offset: int) -> list[Any]:
            parents = flow_run_filter.parent_flow_run_id.any_
            found = children if parents == [root] else [grandchild] if children[4] in parents else []
            return [SimpleNamespace(id=one) for one in found[offset : offset + 2]]

    found = read_subflows(cast("SyncPrefectClient", Api()), root)
    assert found == [*children, grandchild]


def test_the_machines_of_subflows_on_a_work_pool_count(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def inner() -> None:
        marker = f"{worker_marker_prefix(UUID(str(flow_run.id)))}1"
        with dstack.client() as client:
            client.runs.submit(SHORT, marker=marker).wait(poll_interval=0.1)

    @flow
    def spending() -> bool:
        inner()
        return DstackBudget(0.0001, when_spent="skip", credentials=credentials).allows()

    assert not spending()


@pytest.mark.parametrize("timeout", ["8h", -1, 0, math.nan, math.inf, True, 10**12])
def test_a_wrong_approval_timeout_is_an_error_at_once(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^approval_timeout: expected "):
        DstackBudget(5, when_spent="approve", approval_timeout=timeout)


def test_a_wrong_planned_cost_names_its_field(credentials: DstackCredentials) -> None:
    @flow
    def spending() -> None:
        DstackBudget(5, credentials=credentials).allows(planned=-1)

    with pytest.raises(ConfigurationError, match=r"^planned: expected USD above 0, got -1\."):
        spending()


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ConfigurationError, match=r"^max_cost: expected USD above 0"):
        DstackBudget(0)
    with pytest.raises(ConfigurationError, match=r"^when_spent: expected one of 'fail', 'skip', 'approve'"):
        DstackBudget(5, when_spent="ask")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="expected a flow, got code outside of one"):
        DstackBudget(5).allows()
