"""A run whose commands fail holds its container for a shell: on the embedded server and on a real one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.integration import Attempt, AttemptNames, choose_attempt
from tests.contract.conftest import Target

LONG = "10m"


def submit(target: Target, client: dstack.Client, *commands: str, **options: Any) -> dstack.Run:
    options = {"debug_on_failure": LONG, **options}
    return client.runs.submit(target.task(*commands), f"held-{uuid.uuid4().hex[:8]}", **options)


def failed(target: Target, run: dstack.Run) -> dstack.Outcome:
    """Return the outcome once the commands have failed; the run is held then."""
    return run.wait(target.timeout, poll_interval=target.poll_interval)


def ended(target: Target, run: dstack.Run) -> tuple[dstack.Outcome, list[str]]:
    """Return the outcome and the log of a run after its hold."""
    lines: list[str] = []
    for event in run.follow(poll_interval=target.poll_interval, timeout=target.timeout, through_hold=True):
        if isinstance(event, dstack.LogLines):
            lines += event.lines
        if isinstance(event, dstack.RunFinished):
            return event.outcome, lines
    raise AssertionError("the run has no end")


@contextmanager
def held(target: Target, client: dstack.Client, *commands: str, **options: Any) -> Iterator[dstack.Run]:
    """Yield a run that is held, and stop it at the end."""
    run = submit(target, client, *commands, **options)
    try:
        yield run
    finally:
        run.stop()


def test_what_is_left_of_max_duration_is_the_time_of_the_hold(target: Target, client: dstack.Client) -> None:
    with held(target, client, "exit 3", max_duration="5m") as run:
        outcome = failed(target, run)
        assert (outcome.exit_status, bool(outcome.debug_command)) == (3, True)
        assert 200 < outcome.debug_seconds <= 300


@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize(
    ("commands", "status"),
    [
        (["echo one", "exit 3"], 3),
        (["set -eu", "false", "echo two"], 1),
        (["sh -c 'kill -9 $$'"], 137),
        (["no-such-command"], 127),
        (["true & exit 5"], 5),
    ],
    ids=["exit", "set-e", "killed child", "no command", "background"],
)
def test_a_failed_run_counts_as_failed_at_once_and_is_held_until_the_file_is_there(
    target: Target, client: dstack.Client, commands: list[str], status: int, reports: bool
) -> None:
    if target.kind == "real" and (reports or status in (1, 5, 127)):
        pytest.skip("a run takes half a minute there")
    with held(target, client, *commands, reports=reports) as run:
        outcome = failed(target, run)
        assert (outcome.status, outcome.exit_status) == (dstack.RunStatus.FAILED, status)
        assert outcome.debug_command == f"python -m dstack_core attach {run.name}"
        assert outcome.debug_seconds == 600
        assert outcome.debug_cost == pytest.approx((outcome.price_per_hour or 0) / 6, abs=1e-4)
        with pytest.raises(dstack.RunFailedError, match=f"open a shell in it: {outcome.debug_command}"):
            outcome.raise_for_status()
        assert run.status().is_active
        assert run.is_held()
        Path(outcome.debug_done).touch()
        last, lines = ended(target, run)
        assert (last.status, last.exit_status) == (dstack.RunStatus.FAILED, status)
        assert (last.debug_command, last.debug_done) == ("", "")
        assert 0 < last.debug_seconds < 600
        assert f"To end it: touch {outcome.debug_done}" in lines
        assert not Path(outcome.debug_done).exists()
        assert not run.is_held()
    seen = client.runs.get(run.name)
    assert seen is not None
    # What the server itself shows of the end.
    known = seen.outcome()
    assert known is not None
    assert known.exit_status == target.reported_exit_status(status)


def test_a_run_that_succeeds_takes_no_longer(target: Target, client: dstack.Client) -> None:
    run = submit(target, client, "echo one", reports=True)
    outcome, lines = ended(target, run)
    assert (outcome.succeeded, outcome.debug_seconds, outcome.debug_cost) == (True, 0, 0)
    assert [line for line in lines if line.strip() not in ("exit", "")] == ["one"]


def test_a_printed_log_of_another_run_holds_nothing(target: Target, client: dstack.Client) -> None:
    name = f"held-{uuid.uuid4().hex[:8]}"
    done = f"/tmp/dstack-done-{name}-7"
    other = uuid.uuid4()
    printed = [
        f'::dstack::{{"kind":"held","exit_status":{status},"seconds":600,"done":"{path}","run":"{run}"}}'
        for status, path, run in [(0, done, ""), (3, "/etc/passwd", ""), (3, done, other)]
    ]
    printed.append('::dstack::{"kind":"released","seconds":601}')
    commands = [f"echo '{line}'" for line in printed]
    run = client.runs.submit(target.task(*commands, "sleep 1", "echo ok"), name, debug_on_failure=600)
    events = list(run.follow(poll_interval=target.poll_interval, timeout=target.timeout))
    outcome, lines = ended(target, run)
    assert isinstance(events[-1], dstack.RunFinished)
    assert (events[-1].outcome.status, outcome.status) == (dstack.RunStatus.DONE, dstack.RunStatus.DONE)
    assert not any(isinstance(event, dstack.Reported | dstack.ReportsDropped) for event in events)
    # They stay text.
    assert [line for line in lines if line.startswith("::dstack::")] == printed
    assert (outcome.debug_seconds, outcome.debug_command) == (0, "")


def test_commands_that_rename_their_run_are_held(target: Target, client: dstack.Client) -> None:
    with held(target, client, "export DSTACK_RUN_NAME=other DSTACK_RUN_ID=other; exit 3") as run:
        assert failed(target, run).exit_status == 3
        assert run.is_held()


def test_the_hold_ends_by_itself_without_a_watcher(target: Target, client: dstack.Client) -> None:
    run = submit(target, client, "exit 3", debug_on_failure=2)
    with target.client() as other:
        found = other.runs.get(run.name)
        assert found is not None
        outcome, _ = ended(target, found)
    assert (outcome.exit_status, outcome.debug_seconds) == (3, 2)


def test_a_stop_ends_the_hold_at_once(target: Target, client: dstack.Client) -> None:
    with held(target, client, "exit 3") as run:
        failed(target, run)
        stopped = run.stop(until="ended", timeout=target.timeout).outcome
        outcome, _ = ended(target, run)
    # The runner kills what is left 10 s after a stop; this shell was gone by then, and could report.
    assert outcome.exit_status == 3
    assert outcome.debug_seconds < 600
    assert stopped is not None
    assert (stopped.status, stopped.exit_status, stopped.category) == (outcome.status, 3, "user.exit")
    assert stopped.debug_seconds == outcome.debug_seconds > 0
    known = run.outcome()
    assert known is not None
    assert known.exit_status is None or known.exit_status == 3


def test_commands_that_a_stop_has_ended_are_not_held(target: Target, client: dstack.Client) -> None:
    run = submit(target, client, "echo started", "sleep 300")
    for event in run.follow(poll_interval=target.poll_interval, timeout=target.timeout):
        if isinstance(event, dstack.LogLines):
            break
    run.stop()
    outcome, lines = ended(target, run)
    assert outcome.status.was_stopped
    assert outcome.debug_seconds == 0
    assert not any("held" in line for line in lines)


def test_the_limit_of_the_duration_also_limits_the_hold(target: Target, client: dstack.Client) -> None:
    # With less than 10 s left, nothing is held.
    run = submit(target, client, "exit 3", max_duration=20)
    assert 0 < failed(target, run).debug_seconds <= 20
    outcome, _ = ended(target, run)
    assert outcome.exit_status == 3
    assert outcome.debug_seconds < 60


FOLLOWER = """
import json, sys
import dstack_core as dstack

arguments, name, interval = json.loads(sys.argv[1])
with dstack.Client(**arguments) as client:
    for event in client.runs.get(name).follow(poll_interval=interval, through_hold=True):
        if isinstance(event, dstack.Reported):
            print(json.dumps([event.kind, event.progress.to_dict()]), flush=True)
"""


def test_a_follower_that_is_killed_during_the_hold_changes_nothing(
    target: Target, client: dstack.Client
) -> None:
    with held(target, client, "exit 3") as run:
        arguments = json.dumps([target.arguments(), run.name, target.poll_interval])
        with subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, arguments], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            kind, state = json.loads(process.stdout.readline())
            process.kill()
        assert kind == "held"
        progress = dstack.Progress.from_dict(state)
        # Another process continues from there: it knows that the run is held, without reading it again.
        events = list(run.follow(progress, poll_interval=target.poll_interval, timeout=target.timeout))
        assert not any(isinstance(event, dstack.Reported) for event in events)
        assert isinstance(events[-1], dstack.RunFinished)
        assert (events[-1].outcome.exit_status, events[-1].outcome.debug_seconds) == (3, 600)
        assert run.is_held()


def test_the_next_execution_submits_a_new_run(target: Target, client: dstack.Client) -> None:
    names = AttemptNames(f"held-{uuid.uuid4().hex[:8]}", "engine:job/7")
    first = names.ref(1)
    run = client.runs.submit(target.task("exit 3"), first.name, marker=first.marker, debug_on_failure=LONG)
    failed(target, run)
    attempt = Attempt(first)
    assert choose_attempt(client, names, attempt) is None
    assert attempt.ref == names.ref(2)
    # With a fixed name, which the held run still has, that one ends first.
    fixed = AttemptNames(first.name, "engine:job/7", first.name)
    attempt = Attempt(fixed.ref(1))
    assert choose_attempt(client, fixed, attempt) is None
    assert attempt.ref == fixed.ref(2)
    assert not run.status().is_active


def test_attaching_to_a_held_run(
    target: Target, client: dstack.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if target.kind == "real":
        pytest.skip("test_attach.py has the ways to a real container")
    monkeypatch.setenv("HOME", str(tmp_path))
    with held(target, client, "echo evidence > result.txt", "exit 3") as run:
        outcome = failed(target, run)
        with run.attach(timeout=60):
            assert run.is_attached
            assert b"exited with status 3" in bytes(next(iter(run.logs())))
            Path(outcome.debug_done).touch()
        last, _ = ended(target, run)
        assert last.exit_status == 3


def test_async_twins(target: Target) -> None:
    async def body() -> None:
        async with target.async_client() as client:
            name = f"held-{uuid.uuid4().hex[:8]}"
            run = await client.runs.submit(target.task("exit 3"), name, debug_on_failure=LONG)
            outcome = await run.wait(target.timeout, poll_interval=target.poll_interval)
            assert (outcome.exit_status, outcome.debug_seconds) == (3, 600)
            assert await run.is_held()
            await asyncio.to_thread(Path(outcome.debug_done).touch)
            async for event in run.follow(poll_interval=target.poll_interval, through_hold=True):
                if isinstance(event, dstack.RunFinished):
                    assert event.outcome.debug_seconds < 600
            assert not await run.is_held()

    asyncio.run(body())


def test_a_function_raises_at_once_and_its_run_is_held(target: Target, client: dstack.Client) -> None:
    if target.release < (0, 19, 17):
        pytest.skip("functions need files")

    def broken() -> None:
        raise ValueError("boom")

    began = time.monotonic()
    with pytest.raises(dstack.RemoteFunctionError, match="boom") as caught:
        client.functions.run(
            broken,
            configuration=target.task(),
            debug_on_failure=LONG,
            poll_interval=target.poll_interval,
        )
    assert time.monotonic() - began < 300
    assert caught.value.outcome.debug_command in str(caught.value)
    run = client.runs.get(caught.value.outcome.run_name)
    assert run is not None
    assert run.is_held()
    run.stop()
