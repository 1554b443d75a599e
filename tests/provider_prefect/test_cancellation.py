"""How a task learns that its flow run was cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Paused,
    Pending,
    Running,
)

from prefect_dstack._cancellation import CHECK_SECONDS, CancelProbe, StopRequested, is_interrupted, verdict
from prefect_dstack._job import Job


class Runner:
    """A task runner with one event."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._cancel_events = {"other task": threading.Event(), "task": self.event}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


TIMED_OUT: State[Any] = Failed(name="TimedOut")


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("state", [Cancelling(), Cancelled()])
def test_a_cancelled_flow_run_stops_its_tasks(state: State[Any], interrupted: bool) -> None:
    request = verdict(state, interrupted=interrupted)
    assert request is not None
    assert request.cancelled


@pytest.mark.parametrize(
    ("state", "cancelled"), [(Running(), False), (Crashed(), False), (TIMED_OUT, True)], ids=lambda x: str(x)
)
def test_an_interrupted_process_stops_its_tasks(state: State[Any], cancelled: bool) -> None:
    request = verdict(state, interrupted=True)
    assert request is not None
    assert request.cancelled is cancelled
    assert verdict(state, interrupted=False) is None


@pytest.mark.parametrize(
    "state", [Completed(), Failed(), AwaitingRetry(), Pending(), Paused(), None], ids=lambda x: str(x)
)
def test_tasks_of_a_flow_that_merely_ended_may_finish(state: State[Any] | None) -> None:
    assert verdict(state, interrupted=True) is None
    assert verdict(state, interrupted=False) is None


@pytest.mark.parametrize(
    "runner",
    [None, object(), SimpleNamespace(_cancel_events=None), SimpleNamespace(_cancel_events={"a": 1})],
)
def test_a_missing_private_sign_means_no_interrupt(runner: Any) -> None:
    assert is_interrupted(runner) is False


def probe_of(states: list[Any], runner: Any = None) -> tuple[CancelProbe, Clock, list[int]]:
    clock, asked = Clock(), [0]

    def read() -> Iterator[Any]:
        asked[0] += 1
        for state in states:
            if isinstance(state, Exception):
                raise state
            yield state

    return CancelProbe("flow", runner, read_states=read, clock=clock), clock, asked


def test_the_server_is_asked_every_five_seconds_and_at_once_when_interrupted() -> None:
    runner = Runner()
    probe, clock, _ = probe_of([Running()], runner)
    clock.now = 4.9
    due = [probe.is_due]
    clock.now = 5.0
    due.append(probe.is_due)
    assert probe.ask() is None
    due.append(probe.is_due)
    runner.event.set()
    clock.now = 6.0
    due.append(probe.is_due)
    assert due == [False, True, False, True]
    assert probe.ask() is not None


def test_a_failing_prefect_server_stops_nothing() -> None:
    probe, clock, asked = probe_of([ConnectionError("down")])
    clock.now = 10.0
    assert probe.ask() is None
    assert not probe.is_due
    assert asked == [1]


def test_a_cancelled_parent_counts_and_an_interrupted_parent_does_not() -> None:
    runner = Runner()
    runner.event.set()
    probe, _, _ = probe_of([Completed(), Running()], runner)
    assert probe.ask() is None
    probe, _, _ = probe_of([Running(), Cancelling()])
    assert probe.ask() is not None


def test_outside_a_flow_no_request_is_sent() -> None:
    probe = CancelProbe(None, None, clock=Clock())
    assert not probe.is_due
    assert probe.ask() is None
    probe.close()


def test_a_wait_of_0_seconds_also_reads_the_flow_run() -> None:
    """After a request that took too long, the first retry waits for 0 s, and it may take just as long."""
    probe, clock, asked = probe_of([Cancelling()])
    live = SimpleNamespace(is_due=False)
    job: Any = SimpleNamespace(probe=probe, live=live, attempt=SimpleNamespace(run_id=None))
    job.ask = partial(Job.ask, job)
    Job.sleep(job, 0.0)
    assert asked == [0]
    clock.now = CHECK_SECONDS
    with pytest.raises(StopRequested):
        Job.sleep(job, 0.0)
    clock.now += CHECK_SECONDS
    with pytest.raises(StopRequested):
        asyncio.run(Job.asleep(job, 0.0))
