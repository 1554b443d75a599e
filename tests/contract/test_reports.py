"""Results and messages of runs, on the embedded server and on a real one."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from tests.contract.conftest import Target

WRITE = 'echo \'{"loss": 0.25}\' > "$DSTACK_RESULT_FILE"'


def run(
    target: Target, client: dstack.Client, *commands: str, **fields: Any
) -> tuple[dstack.Outcome, list[dstack.Reported], list[str]]:
    """Return the outcome of a run that reports, its messages and its log lines."""
    submitted = client.runs.submit(
        target.task(*commands, **fields), f"reports-{uuid.uuid4().hex[:8]}", reports=True
    )
    messages: list[dstack.Reported] = []
    lines: list[str] = []
    for event in submitted.follow(poll_interval=target.poll_interval, timeout=target.timeout):
        if isinstance(event, dstack.Reported):
            messages.append(event)
        elif isinstance(event, dstack.LogLines):
            lines += event.lines
        elif isinstance(event, dstack.RunFinished):
            return event.outcome, messages, lines
    raise AssertionError("the run has no end")


@pytest.mark.parametrize("shell", [None, "sh", "bash"])
def test_the_result_file(target: Target, client: dstack.Client, shell: str | None) -> None:
    if shell is not None and target.release < (0, 19, 5):
        with pytest.raises(dstack.UnsupportedServerError, match="shell"):
            run(target, client, WRITE, shell=shell)
        return
    outcome, _, lines = run(
        target, client, "echo one", WRITE, "echo two", **({} if shell is None else {"shell": shell})
    )
    assert outcome.succeeded, outcome.message
    assert outcome.result == {"loss": 0.25}
    assert [line for line in lines if line.strip() not in ("exit", "")] == ["one", "two"]


def test_a_failed_run_has_no_result(target: Target, client: dstack.Client) -> None:
    outcome, _, _ = run(target, client, WRITE, "exit 3")
    assert (outcome.has_result, outcome.exit_status) == (False, target.reported_exit_status(3))


def test_a_large_result(target: Target, client: dstack.Client, tmp_path: Path) -> None:
    value = ["ä b" * 100_000]
    (tmp_path / "value.json").write_text(json.dumps(value, ensure_ascii=False))
    outcome, _, _ = run(target, client, f"cat {tmp_path}/value.json > $DSTACK_RESULT_FILE")
    assert outcome.result == value


def test_messages_of_a_line(target: Target, client: dstack.Client) -> None:
    loop = 'for i in 1 2 3; do echo "::dstack::{\\"kind\\":\\"metric\\",\\"loss\\":$i}"; done'
    outcome, found, lines = run(target, client, loop, "echo end")
    assert [message.payload for message in found] == [{"loss": number} for number in (1, 2, 3)]
    assert outcome.metrics == {"loss": 3.0}
    assert "end" in lines


def test_the_module(target: Target, client: dstack.Client) -> None:
    script = "import dstack_report as r; r.metric(step=1, loss=0.5); r.result({'text': 'x' * 9000})"
    outcome, found, _ = run(target, client, f'python3 -c "{script}"')
    if target.release < (0, 19, 17):
        # Without files the server cannot bring it.
        assert not outcome.succeeded
        return
    assert outcome.succeeded, outcome.message
    assert [message.kind for message in found] == ["metric", "result"]
    assert outcome.result == {"text": "x" * 9000}


FOLLOWER = """
import json, sys, time
import dstack_core as dstack

arguments, name, state, interval = json.loads(sys.argv[1])
progress = dstack.Progress.from_dict(state) if state else None
with dstack.Client(**arguments) as client:
    for event in client.runs.get(name).follow(progress, poll_interval=interval):
        step = event.payload["step"] if isinstance(event, dstack.Reported) else None
        end = event.outcome.metrics if isinstance(event, dstack.RunFinished) else None
        print(json.dumps([step, event.progress.to_dict(), end, time.time()]), flush=True)
"""


def follow_until(
    target: Target, name: str, state: dict[str, Any] | None, count: int | None
) -> tuple[list[float], dict[str, Any], dict[str, float] | None]:
    """Follow a run in a process that is killed after ``count`` messages, None: at the end of the run."""
    arguments = json.dumps([target.arguments(), name, state, target.poll_interval])
    command = [sys.executable, "-c", FOLLOWER, arguments]
    steps: list[float] = []
    progress: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            step, progress, end, _ = json.loads(line)
            steps += [] if step is None else [step]
            if end is not None:
                return steps, progress, end
            if count is not None and len(steps) >= count:
                # What it wrote since is lost, as a position that was not saved.
                process.kill()
                return steps, progress, None
    raise AssertionError("the process ended before the run")


def test_messages_are_delivered_once_through_kills(target: Target, client: dstack.Client) -> None:
    script = 'i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo \'::dstack::{"kind":"metric","step":\'$i\',"loss":\'$i\'}\'; sleep 0.01; done'
    name = f"reports-{uuid.uuid4().hex[:8]}"
    client.runs.submit(target.task(script), name)
    steps: list[float] = []
    state: dict[str, Any] | None = None
    for count in (1, 37, 100):
        more, state, end = follow_until(target, name, state, count)
        steps += more
        assert end is None
    more, state, end = follow_until(target, name, state, None)
    assert steps + more == list(range(1, 301))
    assert end == {"loss": 300.0}
