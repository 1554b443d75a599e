"""A run with ``debug_on_failure``: its task fails at once, a retry is a new run, and the reaper leaves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Cancelled, Failed

from dstack_core import RunFailedError, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task
from prefect_dstack.reaper import reap

from .support import all_runs, artifacts_of
from .test_reaper import in_state, is_stopped
from .ways import FAST

pytestmark = pytest.mark.usefixtures("prefect_server")

LONG = "10m"
# Seconds that each reply of a slow server takes.
_SLOW = 1.0


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_each_try_fails_at_once_and_its_run_is_held(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    ids: list[Any] = []

    @flow
    def failing() -> None:
        ids.append(flow_run.id)
        again = task.with_options(retries=1, retry_delay_seconds=0)
        again.submit(Task(commands=["exit 3"]), credentials, debug_on_failure=LONG, **FAST).result()

    with pytest.raises(RunFailedError) as raised:
        failing()
    runs = all_runs(dstack)
    assert len(runs) == 2
    assert all(run.is_held() for run in runs)
    outcome = raised.value.outcome
    assert (outcome.exit_status, outcome.debug_seconds) == (3, 600)
    assert f"To open a shell in it: {outcome.debug_command}" in str(raised.value)
    shown = "\n".join(str(artifact.data) for artifact in artifacts_of(ids[0]).values())
    # The artifact of a task shows its last try.
    assert f"| Shell | {outcome.debug_command} |" in shown
    for run in runs:
        run.stop()


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_run_is_held_on_a_slow_server(
    task: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def failing() -> None:
        task.submit(Task(commands=["exit 3"]), credentials, debug_on_failure=LONG, **FAST).result()

    dstack.faults.slow(_SLOW)
    with pytest.raises(RunFailedError, match="open a shell in it: python -m dstack_core attach") as raised:
        failing()
    dstack.faults.clear()
    assert raised.value.outcome.exit_status == 3
    (run,) = all_runs(dstack)
    assert run.is_held()
    run.stop()


@pytest.mark.parametrize(("make", "stops"), [(Failed, False), (Cancelled, True)])
def test_the_reaper_leaves_a_held_run_unless_its_flow_run_was_cancelled(
    make: Callable[[], State[Any]], stops: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    marker = f"prefect:flow_run/{in_state(make()).id}/stop/abc-0/1"
    with dstack.client() as client:
        run = client.runs.submit(
            Task(commands=["exit 3"]), f"r-{uuid4().hex[:8]}", marker=marker, debug_on_failure=LONG
        )
        run.wait(poll_interval=0.1)
        (finding,) = reap(credentials, min_age=0)
        assert (finding["stopped"], is_stopped(run)) == (stops, stops)
        run.stop()
