"""The progress of a deferred run is saved, and found again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dstack import _trigger_relay
from airflow_provider_dstack._trigger_relay import (
    SECONDS_BETWEEN,
    SECONDS_BETWEEN_IN_A_FLOOD,
    Checkpoints,
    Pace,
)

TI: Any = SimpleNamespace(dag_id="d", run_id="r", task_id="train", try_number=1, map_index=None)


class Saver:
    """The states to be saved; a test finishes each save. Unless ``is_busy``, a save begins at once."""

    def __init__(self, *, is_busy: bool = False) -> None:
        self.is_busy = is_busy
        self.states: list[dict[str, Any]] = []
        self.futures: list[Future[None]] = []
        self._takes: list[Callable[[], dict[str, Any] | None]] = []

    def __call__(self, take: Callable[[], dict[str, Any] | None]) -> Future[None]:
        self._takes.append(take)
        self.futures.append(Future())
        if not self.is_busy:
            self.begin()
        return self.futures[-1]

    def begin(self) -> None:
        """Begin the save that waits."""
        state = self._takes.pop(0)()
        if state is not None:
            self.states.append(state)


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
    clock.now += 0.9 * SECONDS_BETWEEN
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


def test_a_save_that_waits_for_its_turn_saves_the_newest_state() -> None:
    saver, clock = Saver(is_busy=True), Clock()
    checkpoints = Checkpoints(saver, at(0), clock)
    for line in (1, 2, 3):
        assert checkpoints.offer(partial(at, line))
    saver.begin()
    assert saver.states == [at(3)]
    clock.now += 10 * SECONDS_BETWEEN
    # It has begun and not ended, so a newer state needs another save.
    assert not checkpoints.offer(lambda: at(4))
    saver.futures[0].set_result(None)
    assert checkpoints.offer(lambda: at(5))
    assert checkpoints.last(at(6)) is saver.futures[2]
    assert saver.futures[1].cancelled()
    saver.begin()
    assert saver.states == [at(3), at(6)]
    # It began before it could be cancelled, and the last save has taken its state.
    saver.begin()
    assert saver.states == [at(3), at(6)]


def test_a_flood_is_saved_every_ten_seconds_and_again_once_it_has_ended() -> None:
    saver, clock, flood = Saver(), Clock(), [True]
    checkpoints = Checkpoints(saver, at(0), clock, is_flood=lambda: flood[0])
    assert checkpoints.offer(lambda: at(1))
    saver.futures[-1].set_result(None)
    clock.now += SECONDS_BETWEEN_IN_A_FLOOD - 1.0
    assert not checkpoints.offer(lambda: at(2))
    flood[0] = False
    assert checkpoints.offer(lambda: at(2))
    assert saver.states == [at(1), at(2)]


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
    for number in range(4):
        times = iter([number, number + 0.05])
        of_save = SimpleNamespace(sleep=slept.append, monotonic=lambda times=times: next(times))
        monkeypatch.setattr(_trigger_relay, "time", of_save)
        _trigger_relay.save_and_rest(TI, "try 1", {})
    assert slept == pytest.approx([0.0, 0.0, 0.1, 0.3])
    clock.now += 0.3
    assert _trigger_relay._REST.wait_after(0.1) == pytest.approx(0.1)
    clock.now += 10.0
    assert _trigger_relay._REST.wait_after(0.4) == 0.0
