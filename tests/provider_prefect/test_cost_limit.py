"""``max_cost`` of a task: its run is stopped there, and the task fails without another try."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import flow

import dstack_core._flow.cost_limit as limits
from dstack_core import ConfigurationError, RunLimitError, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackRun, arun_task, dstack_task, run_task

from .support import all_runs
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")

# Three seconds on the server of these tests.
LIMIT = 0.001


def nothing() -> None: ...


LONG = Task(commands=["sleep 300"])


@pytest.fixture(autouse=True)
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow so low a limit."""
    monkeypatch.setattr(limits, "_POLL_SECONDS", 0.1)


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_the_task_fails_at_its_limit_and_is_not_tried_again(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def limited() -> None:
        again = task.with_options(retries=2, retry_delay_seconds=0)
        again.submit(LONG, credentials, max_cost=LIMIT, **FAST).result()

    with pytest.raises(RunLimitError, match="stopped at its cost limit") as raised:
        limited()
    assert raised.value.outcome.category == "limit.max_cost"
    (run,) = all_runs(dstack)
    assert run.env["DSTACK_MAX_COST"] == "0.001"


def test_a_task_below_its_limit_succeeds(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def cheap() -> str:
        outcome = run_task(Task(commands=["true"]), credentials, max_cost=1.5, **FAST)
        return str(outcome["status"])

    assert cheap() == "done"


def test_a_function_has_a_limit_too(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @dstack_task(credentials=credentials, max_cost=LIMIT, retries=2, retry_delay_seconds=0, **FAST)
    def slow() -> None:
        import time

        time.sleep(300)

    @flow
    def limited() -> None:
        slow()

    with pytest.raises(RunLimitError, match="stopped at its cost limit"):
        limited()
    assert len(all_runs(dstack)) == 1


def test_a_wrong_limit_is_an_error_before_anything_is_submitted(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def wrong() -> None:
        run_task(LONG, credentials, max_cost=-1, **FAST)

    with pytest.raises(ConfigurationError, match=r"^max_cost: expected USD above 0, got -1"):
        wrong()
    with pytest.raises(ConfigurationError, match=r"^max_cost: expected USD above 0, got 0"):
        dstack_task(max_cost=0)(nothing)
    with pytest.raises(ValueError, match="max_cost"):
        DstackRun(credentials=credentials, configuration={"type": "task", "commands": ["true"]}, max_cost=0)
    assert all_runs(dstack) == []
