"""A run with ``debug_on_failure``: its task fails at once, a retry is a new run, and the reaper leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from prefect import State, flow
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Crashed, Failed, Running, Scheduled

from dstack_core import Run, RunFailedError, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task, stop_dstack_runs
from prefect_dstack.reaper import reap

from .support import all_runs, artifacts_of, set_state
from .test_reaper import idle, in_state, is_stopped
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


# The states that a flow run went through, and whether they end what it holds.
HISTORIES: list[tuple[list[Callable[[], State[Any]]], bool]] = [
    ([Failed], False),
    ([Cancelled], True),
    ([Running, Crashed], False),
    # A signal ended the process before it had seen the cancellation.
    ([Running, Cancelling, Crashed], True),
    ([Running, Cancelling, Failed], True),
    # That was an earlier execution.
    ([Cancelling, Cancelled, Scheduled, Running, Crashed], False),
]


@pytest.fixture
def held(dstack: LocalServer) -> Iterator[Callable[..., tuple[FlowRun, Run]]]:
    """Return what starts a held run of a flow run that went through the states."""
    with dstack.client() as client:

        def start(states: list[Callable[[], State[Any]]], on_crash: str = "stop") -> tuple[FlowRun, Run]:
            owner = in_state(states[0]())
            for make in states[1:]:
                set_state(owner.id, make())
            marker, name = f"prefect:flow_run/{owner.id}/{on_crash}/abc-0/1", f"r-{uuid4().hex[:8]}"
            run = client.runs.submit(Task(commands=["exit 3"]), name, marker=marker, debug_on_failure=LONG)
            run.wait(poll_interval=0.1)
            return owner, run

        yield start
        for run in client.runs.list():
            run.stop()


@pytest.mark.parametrize("on_crash", ["stop", "keep"])
@pytest.mark.parametrize(("states", "stops"), HISTORIES)
def test_the_reaper_leaves_a_held_run_unless_its_flow_run_was_cancelled(
    states: list[Any], stops: bool, on_crash: str, held: Any, credentials: DstackCredentials
) -> None:
    _, run = held(states, on_crash)
    (finding,) = reap(credentials, min_age=0)
    assert (finding["stopped"], is_stopped(run)) == (stops, stops)


@pytest.mark.parametrize(
    ("states", "stops"), [pair for pair in HISTORIES if pair[0][-1] in (Crashed, Cancelled)]
)
def test_the_hook_leaves_a_held_run_unless_its_flow_run_was_cancelled(
    states: list[Any], stops: bool, held: Any, credentials: DstackCredentials
) -> None:
    owner, run = held(states)
    stop_dstack_runs(credentials)(idle, owner, states[-1]())
    assert is_stopped(run) == stops
