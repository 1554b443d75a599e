"""The progress of a deferred run is saved, and found again."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import _trigger_relay
from airflow_provider_dstack._trigger_relay import SECONDS_BETWEEN, Checkpoints, Pace

TI: Any = SimpleNamespace(dag_id="d", run_id="r", task_id="train", try_number=1, map_index=None)


class Saver:
    """The states to be saved; a test finishes each save."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.futures: list[Future[None]] = []

    def __call__(self, state: dict[str, Any]) -> Future[None]:
        self.states.append(state)
        self.futures.append(Future())
        return self.futures[-1]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def at(line: int, status: str = "running") -> dict[str, Any]:
    return {"progress": {"status": status, "cursors": {"job": {"after": str(line)}}}}


def test_progress_is_saved_at_once_and_then_only_after_a_pause() -> None:
    saver, clock = Saver(), Clock()
    checkpoints = Checkpoints(saver, at(0), clock)
    checkpoints.offer(lambda: at(0, "terminating"))
    assert saver.states == []
    checkpoints.offer(lambda: at(1))
    saver.futures[-1].set_result(None)
    clock.now += SECONDS_BETWEEN - 0.1
    checkpoints.offer(lambda: at(2))
    assert saver.states == [at(1)]
    clock.now += 0.2
    checkpoints.offer(lambda: at(1, "terminating"))
    assert saver.states == [at(1)]
    checkpoints.offer(lambda: at(3))
    assert saver.states == [at(1), at(3)]


def test_only_one_save_runs_at_a_time_and_close_cancels_it() -> None:
    saver, clock = Saver(), Clock()
    checkpoints = Checkpoints(saver, at(0), clock)
    checkpoints.offer(lambda: at(1))
    clock.now += 3 * SECONDS_BETWEEN
    checkpoints.offer(lambda: at(2))
    assert len(saver.states) == 1
    checkpoints.close()
    assert saver.futures[0].cancelled()


def test_the_last_state_is_saved_at_once_and_not_cancelled() -> None:
    saver, clock = Saver(), Clock()
    checkpoints = Checkpoints(saver, at(0), clock)
    checkpoints.offer(lambda: at(1))
    last = checkpoints.last(at(2, "done"))
    assert saver.states == [at(1), at(2, "done")]
    assert last is saver.futures[1]
    checkpoints.close()
    assert not last.cancelled()


def test_a_last_state_that_is_or_will_be_saved_is_not_saved_again() -> None:
    saver, clock = Saver(), Clock()
    assert Checkpoints(saver, at(1), clock).last(at(1, "done")) is None
    checkpoints = Checkpoints(saver, at(0), clock)
    checkpoints.offer(lambda: at(1))
    assert checkpoints.last(at(1, "done")) is saver.futures[0]
    assert saver.states == [at(1)]


@pytest.fixture
def xcoms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(_trigger_relay, "push_xcom", lambda ti, key, value: kept.update({key: value}))
    monkeypatch.setattr(_trigger_relay, "pull_xcom", lambda ti, key: kept.get(key))
    monkeypatch.setattr(_trigger_relay, "delete_xcom", lambda ti, key: kept.pop(key))
    return kept


def test_only_the_same_try_finds_the_saved_progress(xcoms: dict[str, Any]) -> None:
    assert _trigger_relay.load(TI, "try 1") is None
    _trigger_relay.save(TI, "try 1", {"tail": ["x"]})
    assert list(xcoms) == ["dstack_progress"]
    assert _trigger_relay.load(TI, "try 1") == {"tail": ["x"]}
    assert _trigger_relay.load(TI, "try 2") is None
    xcoms["dstack_progress"] = "something of somebody else"
    assert _trigger_relay.load(TI, "try 1") is None
    _trigger_relay.forget(TI)
    assert not xcoms


def test_the_pause_after_saves_grows_with_their_time(
    xcoms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    clock = Clock()
    monkeypatch.setattr(_trigger_relay, "_REST", Pace(0.5, clock))
    monkeypatch.setattr(time, "sleep", slept.append)
    for number in range(4):
        times = iter([number, number + 0.05])
        monkeypatch.setattr(time, "monotonic", lambda times=times: next(times))
        _trigger_relay.save_and_rest(TI, "try 1", {})
    assert slept == pytest.approx([0.0, 0.0, 0.1, 0.3])
    clock.now += 0.3
    assert _trigger_relay._REST.wait_after(0.1) == pytest.approx(0.1)
    clock.now += 10.0
    assert _trigger_relay._REST.wait_after(0.4) == 0.0
