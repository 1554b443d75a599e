"""What a trigger relays, saves for the next one, and shares with others of its process."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dstack import _stop, _trigger_relay, triggers
from airflow_provider_dstack._log_relay import LogPosition, new_relay
from airflow_provider_dstack._trigger_relay import Checkpoints, TriggerRelay
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import LogCursor, LogLines, Outcome, Progress, RetryPolicy
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for
from tests.provider_airflow.triggering import payloads, submitted, trigger_for, until
from tests.replaced import replace_in


@pytest.fixture
def xcoms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep the XComs of the task in a dict."""
    kept: dict[str, Any] = {}

    def push(ti: object, key: str, value: Any) -> None:
        kept[key] = json.loads(json.dumps(value))

    monkeypatch.setattr(_trigger_relay, "push_xcom", push)
    monkeypatch.setattr(_trigger_relay, "pull_xcom", lambda ti, key: kept.get(key))
    return kept


class Log(logging.Handler):
    """The log of a trigger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().split("\n")

    def logger(self) -> logging.Logger:
        logger = logging.Logger("trigger")
        logger.addHandler(self)
        return logger

    def of(self, trigger: DstackRunTrigger) -> DstackRunTrigger:
        trigger._log = self.logger()  # type: ignore[assignment]  # Airflow's is structlog's
        return trigger


async def _never() -> None:
    """Fail, because the test must not wait for the end of its run."""
    raise AssertionError


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_new_trigger_continues_after_what_the_old_one_saved(
    server: LocalServer, xcoms: dict[str, Any], tmp_path: Path, log: Log
) -> None:
    gate = tmp_path / "gate"
    run = submitted(server, f"echo one; echo two; until [ -e {gate} ]; do sleep 0.1; done; echo three")
    arguments = trigger_for(run).serialize()[1]
    first = log.of(trigger_for(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trigger_relay, "SECONDS_BETWEEN", 0.0)
        asyncio.run(until(first, lambda: xcoms.get("dstack_progress", {}).get("tail") == ["one", "two"]))
    gate.touch()
    second = log.of(DstackRunTrigger(**arguments))
    second.task_instance = first.task_instance
    (payload,) = asyncio.run(payloads(second))
    assert payload["tail"] == ["one", "two", "three"]
    words = ("one", "two", "three")
    assert [line for line in log.lines if line in words] == list(words)


def test_the_last_lines_are_saved_before_the_event(
    server: LocalServer, xcoms: dict[str, Any], log: Log
) -> None:
    run = submitted(server, "echo one; echo two")
    run.wait(60, poll_interval=0.1)
    arguments = trigger_for(run).serialize()[1]
    first = log.of(trigger_for(run, not_before=time.time() + 60.0))
    asyncio.run(until(first, lambda: xcoms.get("dstack_progress", {}).get("tail") == ["one", "two"]))
    second = log.of(DstackRunTrigger(**arguments))
    second.task_instance = first.task_instance
    (payload,) = asyncio.run(payloads(second))
    assert payload["tail"] == ["one", "two"]
    assert [line for line in log.lines if line in ("one", "two")] == ["one", "two"]


def test_a_last_save_that_takes_long_delays_the_event_little(
    server: LocalServer, xcoms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "_SAVE_LAST_SECONDS", 0.1)
    released = threading.Event()
    monkeypatch.setattr(triggers, "save_and_rest", lambda *_: released.wait(60))
    run = submitted(server, "echo one; echo two")
    try:
        (payload,) = asyncio.run(payloads(trigger_for(run)))
        assert payload["kind"] == "finished"
        assert not released.is_set()
    finally:
        released.set()


def test_an_airflow_that_cannot_save_progress_does_no_harm(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no XCom today")

    monkeypatch.setattr(_trigger_relay, "push_xcom", refuse)
    monkeypatch.setattr(_trigger_relay, "pull_xcom", refuse)
    run = submitted(server, "echo one")
    (payload,) = asyncio.run(payloads(log.of(trigger_for(run))))
    assert payload["tail"] == ["one"]
    assert any("no XCom today" in line for line in log.lines)


def test_the_budget_holds_in_the_trigger_and_the_tail_is_known(
    server: LocalServer, xcoms: dict[str, Any], log: Log
) -> None:
    run = submitted(server, "for i in $(seq 1 2000); do echo line-$i; done")
    (payload,) = asyncio.run(payloads(log.of(trigger_for(run, log_budget_bytes=500))))
    shown = [line for line in log.lines if line.startswith("line-")]
    assert shown == [f"line-{i}" for i in range(1, len(shown) + 1)]
    assert 400 < sum(len(line) + 1 for line in shown) <= 500
    assert payload["tail"][-1] == "line-2000"
    (told,) = [line for line in log.lines if "of the log is not shown" in line]
    assert told == f"18.4 kB of the log is not shown here. See {run.url}"


def test_values_of_env_are_hidden_by_the_trigger(
    server: LocalServer, xcoms: dict[str, Any], log: Log
) -> None:
    run = server.client().runs.submit(
        {"type": "task", "commands": ["echo it is $WORD_TOKEN"], "env": {"WORD_TOKEN": "open-sesame-77"}},
        run_name="deferred",
        marker="ours",
    )
    (payload,) = asyncio.run(payloads(log.of(trigger_for(run))))
    assert payload["tail"] == ["it is ***"]
    assert "it is ***" in log.lines
    assert not any("open-sesame" in line for line in log.lines)
    assert "open-sesame" not in str(xcoms)


def test_after_another_run_took_the_name_only_the_own_outcome_is_reported(
    server: LocalServer, xcoms: dict[str, Any]
) -> None:
    run = submitted(server, "echo ours")
    run.wait(30, poll_interval=0.1)
    server.client().runs.submit(
        {"type": "task", "commands": ["sleep 600"]}, run_name=run.name, marker="theirs"
    )
    (payload,) = asyncio.run(payloads(trigger_for(run)))
    assert payload["outcome"]["run_id"] == run.id
    assert payload["tail"] == []


def test_a_flood_of_lines_does_not_starve_the_event_loop(
    server: LocalServer, xcoms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trigger_relay, "_BYTES_PER_SECOND", 1e9)
    # However busy the machine is, no part of the log is left to the worker.
    monkeypatch.setattr(_trigger_relay, "_BEHIND_SECONDS", 1e9)
    run = submitted(server, "seq 1 200000")
    turns = 0

    async def watched() -> list[Any]:
        nonlocal turns
        following = asyncio.create_task(payloads(trigger_for(run)))
        while not following.done():
            turns += 1
            await asyncio.sleep(0)
        return await following

    (payload,) = asyncio.run(watched())
    assert payload["tail"][-1] == "200000"
    # 1.3 MB in records of 16 KiB: the event loop ran other tasks between all of them.
    assert turns > 80


def test_a_trigger_relays_no_faster_than_a_triggerer_can_handle(
    server: LocalServer, xcoms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float, result: Any = None) -> None:
        slept.append(seconds)
        await real(min(seconds, 0.05))

    # A run that has ended is not waited for.
    run = submitted(server, "seq 1 200000; echo written; sleep 600")
    wait_for("log", lambda: b"written" in b"".join(run.logs()))
    replace_in(monkeypatch, _trigger_relay, "asyncio", sleep=sleep)
    asyncio.run(until(trigger_for(run), lambda: sum(slept) > 1))


def test_all_triggers_of_a_process_share_their_polls(
    server: LocalServer, xcoms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stop, "task_state", lambda ti: "deferred")
    number = 30
    runs = [
        server.client().runs.submit(
            {"type": "task", "commands": ["true"], "resources": {"gpu": 99}},
            run_name=f"shared-{i}",
            marker="ours",
            retry_policy=RetryPolicy(retry=True),
        )
        for i in range(number)
    ]

    async def go() -> None:
        tasks = [asyncio.create_task(payloads(trigger_for(run, poll_interval=0.5))) for run in runs]
        await asyncio.to_thread(wait_for, "polls", lambda: len(paths(server, "/runs/list")) > 3)
        gets = len(paths(server, "/runs/get"))
        lists = len(paths(server, "/runs/list"))
        await asyncio.to_thread(wait_for, "polls", lambda: len(paths(server, "/runs/list")) > lists + 5)
        assert len(paths(server, "/runs/get")) - gets < number
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(go())
    assert paths(server, "/runs/stop") == []


def test_a_run_that_ends_during_a_long_line_leaves_the_rest_to_the_worker_whole() -> None:
    # 655,360 characters in pieces: more than the burst, so the trigger is held up and sees the end.
    after = Progress("af-1", cursors={"job": LogCursor(after="1")})
    pieces = LogLines(after, ("one", *("x" * 65_536 for _ in range(10))), 0, 0, 0, "job")

    def start_save(take: Callable[[], dict[str, Any] | None]) -> Future[None]:
        return Future()

    async def ended() -> Outcome:
        known = {
            "run_name": "af-1",
            "run_id": "id-1",
            "project": "main",
            "status": "done",
            "message": "finished",
        }
        return Outcome.from_dict({**known, "cost": 0.0, "url": "http://dstack"})

    async def go() -> LogPosition:
        position = LogPosition(Progress("af-1"), {})
        checkpoints = Checkpoints(start_save, {"progress": position.progress.to_dict()})
        relay = TriggerRelay(new_relay(), position, checkpoints, ended)
        assert not await relay.write(pieces, logging.getLogger("test"))
        await relay.close()
        return LogPosition.from_dict(relay.state())

    left = asyncio.run(go())
    assert left.progress == after
    rest = LogLines(after.with_cursor("job", LogCursor(after="2")), ("the end", "two"), 0, 0, 0, "job")
    assert [part.lines for part, _ in left.new_parts(rest)] == [("the end", "two")]


def test_the_end_of_a_burst_is_saved_although_no_further_line_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trigger_relay, "SECONDS_BETWEEN", 0.05)
    kept: list[Any] = []
    now = [1000.0]

    def start_save(take: Callable[[], dict[str, Any] | None]) -> Future[None]:
        state = take()
        assert state is not None
        kept.append(state["progress"]["cursors"]["job"]["after"])
        saved: Future[None] = Future()
        saved.set_result(None)
        return saved

    def line(number: int) -> LogLines:
        progress = Progress("af-1", cursors={"job": LogCursor(after=str(number))})
        return LogLines(progress, (f"line-{number}",), 0, 0, 0, "job")

    async def go() -> None:
        first = {"progress": Progress("af-1").to_dict()}
        position = LogPosition(Progress("af-1"), {})
        checkpoints = Checkpoints(start_save, first, lambda: now[0])
        relay = TriggerRelay(new_relay(), position, checkpoints, _never)
        for number in (1, 2, 3):
            await relay.write(line(number), logging.getLogger("test"))
        assert kept == ["1"]
        now[0] += 10.0
        async with asyncio.timeout(30):
            while kept != ["1", "3"]:  # noqa: ASYNC110 - of a timer nobody is told
                await asyncio.sleep(0.01)
        await relay.write(line(4), logging.getLogger("test"))
        await relay.close()
        assert relay._later is not None
        assert relay._later.cancelled()

    asyncio.run(go())
