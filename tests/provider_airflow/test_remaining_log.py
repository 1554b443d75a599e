"""A deferred run that ends before its log is relayed: the trigger fires, and the worker relays the rest.

The clock of the trigger's rate limit stands still in these tests: once the burst is used up, a trigger that
waited for the log would wait forever.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dstack import _remaining_log, _trigger_relay, triggers
from airflow_provider_dstack._log_relay import LogPosition, new_relay
from airflow_provider_dstack._previous_try import RECORD_KEY, Record
from airflow_provider_dstack._run_reports import RunReports
from airflow_provider_dstack._trigger_relay import Checkpoints, TriggerRelay
from airflow_provider_dstack.errors import DstackRunFailed, DstackRunInterrupted, DstackRunStopped
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import LogCursor, LogLines, Outcome, Reported, ReportLimits, Run, RunStatus, StatusChanged
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for
from tests.provider_airflow.test_operator import CONTEXT, Store, operator
from tests.provider_airflow.test_relay import OUTCOME, PROGRESS
from tests.provider_airflow.test_trigger_relay import Log
from tests.provider_airflow.triggering import payloads, submitted, trigger_for, until

# 10 MB in lines of 100 bytes.
_LINES = 100_000
_BURST_BYTES = 500_000
# What may be relayed beyond the burst: what the first poll for the end takes, and a part of an event.
_SLACK_BYTES = 400_000


def writing(lines: int = _LINES, then: str = "true") -> str:
    program = f'BEGIN {{ for (i = 0; i < {lines}; i++) printf "line-%09d-%084d\\n", i, 0 }}'
    return f"awk '{program}'; {then}"


def line(number: int) -> str:
    return f"line-{number:09}-{0:084}"


@pytest.fixture(autouse=True)
def clock_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triggers, "TriggerRelay", partial(TriggerRelay, clock=lambda: 1000.0))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def worker_log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Return the log of the operator in the resumed task."""
    handler = Log()
    logger = logging.Logger("task")
    logger.addHandler(handler)
    monkeypatch.setattr(DstackRunOperator, "log", logger)
    return handler


def fired(run: Run, log: Log, **arguments: Any) -> Any:
    """Return the payload of the trigger's event."""

    async def go() -> Any:
        async with asyncio.timeout(90):
            (payload,) = await payloads(log.of(trigger_for(run, **arguments)))
        return payload

    return asyncio.run(go())


def ended(server: LocalServer, command: str) -> Run:
    run = submitted(server, command)
    run.wait(60, poll_interval=0.1)
    return run


def lines_of(log: Log) -> list[str]:
    return [text for text in log.lines if text.startswith("line-")]


def test_the_end_of_a_task_does_not_wait_for_ten_megabytes_of_log(
    server: LocalServer, log: Log, worker_log: Log
) -> None:
    run = ended(server, writing(then="echo the last line"))
    payload = fired(run, log, log_budget_bytes=None)
    relayed = lines_of(log)
    assert _BURST_BYTES <= sum(len(text) + 1 for text in relayed) < _BURST_BYTES + _SLACK_BYTES
    assert f"Run {run.name} has ended. The worker relays the rest of its log." in log.lines
    assert payload["rest"]["relayed_bytes"] == sum(len(text) + 1 for text in relayed)
    result = operator(log_budget_bytes=None).execute_complete(CONTEXT, payload)
    assert result["status"] == "done"
    assert relayed + lines_of(worker_log) == [line(number) for number in range(_LINES)]
    assert worker_log.lines[-2] == "the last line"
    assert worker_log.lines[-1].startswith(f"Run {run.name} finished")
    assert not any(text.startswith(f"Run {run.name} finished") for text in log.lines)


def test_a_run_that_ends_while_its_trigger_is_behind_ends_its_task(
    server: LocalServer, log: Log, worker_log: Log, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run = submitted(server, writing(30_000, f"until [ -e {gate} ]; do sleep 0.1; done; echo the last line"))
    threading.Thread(target=lambda: _touch_when(gate, lambda: len(lines_of(log)) > 6_000)).start()
    payload = fired(run, log)
    assert "rest" in payload
    operator().execute_complete(CONTEXT, payload)
    assert lines_of(log) + lines_of(worker_log) == [line(number) for number in range(30_000)]
    assert "the last line" in worker_log.lines


def _touch_when(gate: Path, condition: Callable[[], object]) -> None:
    wait_for("trigger that is behind", condition)
    gate.touch()


def test_a_short_log_is_relayed_by_the_trigger_alone(server: LocalServer, log: Log) -> None:
    run = ended(server, writing(4_000))
    payload = fired(run, log)
    assert "rest" not in payload
    assert lines_of(log) == [line(number) for number in range(4_000)]
    before = len(server.requests)
    operator().execute_complete(CONTEXT, payload)
    assert len(server.requests) == before


def test_a_failed_run_shows_its_last_lines(server: LocalServer, log: Log, worker_log: Log) -> None:
    payload = fired(ended(server, writing(20_000, "echo out of memory; exit 3")), log)
    assert "rest" in payload
    with pytest.raises(DstackRunFailed, match="status 3") as raised:
        operator().execute_complete(CONTEXT, payload)
    # The worker's log has them, so the error does not repeat them.
    assert "out of memory" not in str(raised.value)
    assert raised.value.last_lines[-2:] == [line(19_999), "out of memory"]
    assert "out of memory" in worker_log.lines


def test_the_budget_holds_for_trigger_and_worker_together(
    server: LocalServer, log: Log, worker_log: Log
) -> None:
    run = ended(server, writing(20_000))
    payload = fired(run, log, log_budget_bytes=1_500_000)
    operator(log_budget_bytes=1_500_000).execute_complete(CONTEXT, payload)
    relayed = lines_of(log) + lines_of(worker_log)
    assert relayed == [line(number) for number in range(15_000)]
    assert f"500.0 kB of the log is not shown here. See {run.url}" in worker_log.lines


def test_a_log_beyond_the_budget_is_not_read_to_its_end_by_the_trigger(
    server: LocalServer, log: Log, worker_log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trigger_relay, "_BYTES_READ_PER_SECOND", _trigger_relay._BYTES_PER_SECOND)
    run = ended(server, writing(20_000))
    payload = fired(run, log, log_budget_bytes=1_000)
    assert payload["rest"]["left_out_bytes"] < _BURST_BYTES + _SLACK_BYTES
    operator(log_budget_bytes=1_000).execute_complete(CONTEXT, payload)
    assert lines_of(log) + lines_of(worker_log) == [line(number) for number in range(10)]
    assert f"2.0 MB of the log is not shown here. See {run.url}" in worker_log.lines


def test_secrets_are_hidden_in_the_rest(server: LocalServer, log: Log, worker_log: Log) -> None:
    run = server.client().runs.submit(
        {
            "type": "task",
            "commands": [writing(20_000, f"echo it is $WORD_TOKEN and {server.token} and swordfish")],
            "env": {"WORD_TOKEN": "open-sesame-77"},
        },
        run_name="deferred",
        marker="ours",
    )
    run.wait(60, poll_interval=0.1)
    payload = fired(run, log)
    given = {"type": "task", "commands": ["true"], "env": {"OTHER_KEY": "swordfish"}}
    operator(configuration=given).execute_complete(CONTEXT, payload)
    assert "it is *** and *** and ***" in worker_log.lines
    assert "open-sesame" not in str(payload)


@pytest.mark.parametrize("fault", ["/logs/poll", "/runs/get"])
def test_a_server_outage_costs_the_rest_of_the_log_but_not_the_outcome(
    server: LocalServer, log: Log, worker_log: Log, fault: str
) -> None:
    run = ended(server, writing(20_000))
    payload = fired(run, log)
    server.faults.add(fault, times=None, status=503)
    result = operator(retry_budget=0.5).execute_complete(CONTEXT, payload)
    assert result["status"] == "done"
    warning, summary = worker_log.lines[-2:]
    assert warning.startswith(f"Could not relay the rest of the log of run {run.name}: ")
    assert warning.endswith(f". See {run.url}")
    assert summary.startswith(f"Run {run.name} finished")


def test_an_unreachable_server_is_waited_for_at_most_a_minute() -> None:
    event: dict[str, Any] = {"rest": {}, "tail": []}
    task = operator()
    rest = _remaining_log.RemainingLog(
        event,
        OUTCOME,
        RunReports(),
        OUTCOME.run_name,
        OUTCOME.url,
        task.hook(),
        (),
        list,
        None,
        task.retry_budget,
        ReportLimits(),
        task.log,
    )
    assert rest.retry_budget == 60.0


def test_the_last_lines_of_a_failed_run_are_not_those_of_its_middle(
    server: LocalServer, log: Log, worker_log: Log
) -> None:
    payload = fired(ended(server, writing(20_000, "exit 3")), log)
    server.faults.add("/logs/poll", times=None, status=503)
    with pytest.raises(DstackRunFailed, match="status 3") as caught:
        operator(retry_budget=0.5).execute_complete(CONTEXT, payload)
    assert "last log lines" not in str(caught.value)


def test_another_run_under_the_name_is_not_read(server: LocalServer, log: Log, worker_log: Log) -> None:
    run = ended(server, writing(20_000))
    payload = fired(run, log)
    server.client().runs.submit(
        {"type": "task", "commands": ["echo theirs"]}, run_name=run.name, marker="theirs"
    ).wait(60, poll_interval=0.1)
    assert operator().execute_complete(CONTEXT, payload)["run_id"] == run.id
    assert "theirs" not in worker_log.lines
    assert any("another run has its name" in text for text in worker_log.lines)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "relayed"])
def test_a_task_ended_during_the_rest_of_the_log_stops_nothing_and_keeps_its_record(
    server: LocalServer, log: Log, worker_log: Log, killed: bool
) -> None:
    run = ended(server, writing(20_000))
    payload = fired(run, log)
    record = Record(run.name, "ours", "main", 1, 0)
    context: Any = {**CONTEXT, "task_state_store": Store({RECORD_KEY: asdict(record)})}
    task = operator()
    if not killed:
        task.execute_complete(context, payload)
        assert context["task_state_store"] == {}
        return
    server.faults.add("/logs/poll", times=None, delay=2.0)
    before = len(paths(server, "/logs/poll"))

    def kill() -> None:
        wait_for("request for the log", lambda: len(paths(server, "/logs/poll")) > before)
        task.on_kill()

    threading.Thread(target=kill).start()
    with pytest.raises(
        DstackRunInterrupted, match="The task was ended while the rest of its log was relayed"
    ):
        task.execute_complete(context, payload)
    assert paths(server, "/runs/stop") == []
    # A next try finds the run that succeeded, and shows its whole log.
    assert context["task_state_store"] != {}


def test_a_trigger_that_takes_over_in_the_middle_of_a_page_repeats_nothing(
    server: LocalServer, log: Log, worker_log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(_trigger_relay, "push_xcom", lambda ti, key, value: kept.update({key: value}))
    monkeypatch.setattr(_trigger_relay, "pull_xcom", lambda ti, key: kept.get(key))
    monkeypatch.setattr(_trigger_relay, "SECONDS_BETWEEN", 0.0)
    run = submitted(server, writing(20_000, "echo written; sleep 600"))
    wait_for("log", lambda: b"written" in b"".join(run.logs()))
    first = trigger_for(run)
    arguments = first.serialize()[1]
    # Its clock stands still, so it is held up in a page; what it saved last is all that it relayed.
    asyncio.run(
        until(
            log.of(first),
            lambda: len(lines_of(log)) > 4_000 and kept.get("dstack_progress", {}).get("ahead"),
        )
    )
    server.client().runs.stop(run.name, until="ended")
    # What a killed trigger logs after it last saved its position is logged again.
    relayed = lines_of(log)[: kept["dstack_progress"]["relayed_bytes"] // (len(line(0)) + 1)]
    second = Log()
    payload = fired(run, second, **{key: arguments[key] for key in ("progress", "tail")})
    with pytest.raises(DstackRunStopped):
        operator().execute_complete(CONTEXT, payload)
    assert relayed + lines_of(second) + lines_of(worker_log) == [line(number) for number in range(20_000)]


# The supervisor reads 4 KiB of log for each request. Behind a flood its pipe is full.
@pytest.mark.parametrize(("command", "requests"), [("echo one", 0), (writing(20_000), 56)])
def test_airflow_has_read_the_log_before_its_position_is_saved(
    server: LocalServer, log: Log, monkeypatch: pytest.MonkeyPatch, command: str, requests: int
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_trigger_relay, "push_xcom", lambda ti, key, value: asked.append("push"))
    monkeypatch.setattr(_trigger_relay, "pull_xcom", lambda ti, key: asked.append("pull"))
    fired(ended(server, command), log)
    assert asked[0] == "pull"
    assert asked[-requests - 1 :] == [*["pull"] * requests, "push"]
    assert requests or asked.count("pull") == 1


def relay_with(
    clock: Callable[[], float], wait_for_end: Callable[[], Any], *, poll_interval: float = 5.0
) -> TriggerRelay:
    state = {"progress": PROGRESS.to_dict()}
    checkpoints = Checkpoints(lambda state: asyncio.get_running_loop().create_future(), state)
    position = LogPosition(PROGRESS, {})
    return TriggerRelay(
        new_relay(), position, checkpoints, wait_for_end, poll_interval=poll_interval, clock=clock
    )


def page(number: int) -> LogLines:
    progress = PROGRESS.with_cursor("job", LogCursor(after=str(number)))
    return LogLines(progress, tuple(map(line, range(number, number + 1000))), 0, 0, 0, "job")


def test_a_triggerer_too_busy_for_its_rate_also_watches_for_the_end() -> None:
    moments = itertools.count(0.0, 0.4)

    async def end() -> Outcome:
        return OUTCOME

    async def go() -> None:
        # Each record takes longer than the rate limit asks for, so there is no pause.
        relay = relay_with(lambda: next(moments), end)
        assert not await relay.write(page(0), logging.getLogger("test"))
        assert relay.outcome == OUTCOME
        assert relay.state()["ahead"]["job"] < 1000
        await relay.close()

    asyncio.run(go())


def test_a_follower_that_has_caught_up_no_longer_watches_for_the_end() -> None:
    now = [0.0]
    watching: list[int] = []

    async def end() -> Outcome:
        watching.append(1)
        try:
            await asyncio.sleep(3600)
        finally:
            watching.pop()
        raise AssertionError

    async def go() -> None:
        relay = relay_with(lambda: now[0], end)
        for number in range(6):
            await relay.write(page(number * 1000), logging.getLogger("test"))
        assert watching
        now[0] += 10.0
        await relay.write(page(6000), logging.getLogger("test"))
        await asyncio.sleep(0)
        assert not watching
        await relay.close()

    asyncio.run(go())


def test_a_trigger_that_keeps_up_with_messages_does_not_watch_for_the_end() -> None:
    """A run that reports is read twice an interval, and polls that are shared come a little early."""
    now = [0.0]

    async def end() -> Outcome:
        raise AssertionError

    async def go() -> None:
        relay = relay_with(lambda: now[0], end)
        for number in range(1, 10):
            progress = PROGRESS.with_cursor("job", LogCursor(after=str(number)))
            await relay.write(Reported(progress, "metric", {"loss": 1.0}), logging.getLogger("test"))
            assert relay._end is None
            now[0] += 2.0
        await relay.close()

    asyncio.run(go())


def test_a_follower_whose_log_falls_silent_no_longer_watches_for_the_end() -> None:
    async def go() -> None:
        ended = asyncio.Event()

        async def end() -> Outcome:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()
            raise AssertionError

        relay = relay_with(time.monotonic, end, poll_interval=0.1)
        for number in range(6):
            await relay.write(page(number * 1000), logging.getLogger("test"))
        await asyncio.wait_for(ended.wait(), 60)
        await relay.close()

    asyncio.run(go())


@pytest.mark.parametrize("seconds", [0.0, 2.0, 60.0])
def test_a_trigger_that_starts_late_does_not_watch_for_the_end(seconds: float) -> None:
    """Where thousands start together, the first event comes seconds after the start."""
    now = [0.0]

    async def end() -> Outcome:
        raise AssertionError

    async def go() -> None:
        relay = relay_with(lambda: now[0], end)
        now[0] = seconds
        await relay.write(StatusChanged(PROGRESS, RunStatus.RUNNING, None, None), logging.getLogger("test"))
        await relay.write(page(0), logging.getLogger("test"))
        assert relay._end is None
        await relay.close()

    asyncio.run(go())


def test_a_failed_watch_for_the_end_changes_nothing() -> None:
    asked: list[int] = []

    async def end() -> Outcome:
        asked.append(1)
        raise OSError("no answer")

    async def go() -> None:
        relay = relay_with(lambda: 0.0, end)
        for number in range(6):
            assert await relay.write(page(number * 1000), logging.getLogger("test"))
        assert relay.outcome is None
        await relay.close()

    asyncio.run(go())
    assert asked == [1]
