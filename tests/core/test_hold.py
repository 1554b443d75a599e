"""The command that holds a container after a failure: what it refuses, and what it does in plain shells."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._report.delivery import with_command
from dstack_core._report.hold import with_hold
from dstack_core.integration import describe_failure
from dstack_core.local import LocalServer
from dstack_core.models.configurations import Task
from dstack_core.models.options import hold_seconds
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress, ReportedSoFar
from dstack_core.models.statuses import RunStatus

SHELLS = [shell for shell in ("sh", "bash", "dash", "ksh", "zsh") if shutil.which(shell)]
TASK: dict[str, Any] = {"type": "task", "commands": ["true"]}


@pytest.mark.parametrize(
    ("option", "seconds"),
    [(None, None), (False, None), (1, 1), (90, 90), ("90", 90), ("30m", 1800), ("2h", 7200), ("1w", 604800)],
)
def test_durations(option: Any, seconds: int | None) -> None:
    assert hold_seconds(option) == seconds


@pytest.mark.parametrize("option", [0, -1, True, 1.5, "soon", "off", "8d", [30]])
def test_a_wrong_duration_is_refused(option: Any) -> None:
    with pytest.raises(dstack.ConfigurationError, match="debug_on_failure: expected seconds above 0"):
        hold_seconds(option)


@pytest.mark.parametrize(
    ("configuration", "options", "message"),
    [
        ({"type": "service", "port": 80, "commands": ["x"]}, {}, "expected a task, got type 'service'"),
        ({**TASK, "entrypoint": "run"}, {}, "expected commands, got entrypoint 'run'"),
        ({"type": "task", "image": "x"}, {}, "expected commands, got None"),
        ({**TASK, "shell": "fish"}, {}, "got 'fish'"),
        (TASK, {"retry_policy": True}, 'without retry on "error"'),
        (TASK, {"retry_policy": {"on_events": ["error"], "duration": "1h"}}, 'without retry on "error"'),
        ({**TASK, "retry": True}, {}, 'without retry on "error"'),
        (TASK, {"profile": dstack.Profile(name="p", retry=True)}, 'without retry on "error"'),
    ],
)
def test_what_cannot_be_held_is_refused_before_a_request(
    configuration: Any, options: dict[str, Any], message: str
) -> None:
    with (
        dstack.Client(server_url="http://127.0.0.1:9", project_name="main", user_token="t") as client,
        pytest.raises(dstack.ConfigurationError, match=message),
    ):
        client.runs.submit(configuration, debug_on_failure="30m", **options)


def started(
    shell: str, tmp_path: Path, *commands: str, reports: bool = False, **options: Any
) -> subprocess.Popen[str]:
    task = Task(commands=list(commands))
    if reports:
        task = with_command(task)  # type: ignore[assignment]
    text = " && ".join(with_hold(task, 600, reports=reports, **options).commands or [])
    return subprocess.Popen(
        [shell, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "DSTACK_RUN_NAME": "train"},
        start_new_session=True,
        cwd=tmp_path,
    )


def line_of(process: subprocess.Popen[str], start: str) -> str:
    assert process.stdout is not None
    return next(line.strip() for line in process.stdout if line.startswith(start))


@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize("shell", SHELLS)
def test_the_file_ends_the_hold_in_each_shell(shell: str, reports: bool, tmp_path: Path) -> None:
    with started(shell, tmp_path, "set -eu", "exit 3", reports=reports) as process:
        Path(line_of(process, "To end it: touch ").removeprefix("To end it: touch ")).touch()
        assert process.wait(60) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize("shell", SHELLS)
def test_a_first_command_with_a_background_process_is_held(shell: str, reports: bool, tmp_path: Path) -> None:
    with started(shell, tmp_path, "true & exit 3", reports=reports) as process:
        Path(line_of(process, "To end it: touch ").removeprefix("To end it: touch ")).touch()
        assert process.wait(60) == 3


@pytest.mark.parametrize(
    "command",
    [
        "export TMPDIR=relative; mkdir relative; exit 3",
        "export TMPDIR=$PWD/'with space'; mkdir \"$TMPDIR\"; exit 3",
        "export TMPDIR=$PWD/removed; mkdir removed; cd removed; rmdir ../removed; exit 3",
        "umask 777; set -C; exit 3",
        "DSTACK_NODE_RANK=x; unset PWD HOME TMPDIR; exit 3",
        "alias rm='rm -i' touch=false; IFS=0; set -f; exit 3",
    ],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_the_file_can_be_made_from_another_folder_whatever_the_commands_changed(
    shell: str, command: str, tmp_path: Path
) -> None:
    with started(shell, tmp_path, command) as process:
        entered = line_of(process, "To end it: ").removeprefix("To end it: ")
        payload = json.loads(line_of(process, "::dstack::").removeprefix("::dstack::"))
        assert entered == f"touch {payload['done']}"
        subprocess.run(["sh", "-c", entered], cwd="/", check=True)
        assert process.wait(60) == 3
    assert not Path(payload["done"]).exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failed_node_names_itself(shell: str, tmp_path: Path) -> None:
    with started(shell, tmp_path, "DSTACK_NODE_RANK=1 DSTACK_NODES_NUM=2; exit 3") as process:
        line = "To open a shell in it: "
        assert line_of(process, line) == f"{line}python -m dstack_core attach train --node 1"
        payload = json.loads(line_of(process, "::dstack::").removeprefix("::dstack::"))
        assert (payload["node"], payload["nodes"]) == (1, 2)
        Path(payload["done"]).touch()
        assert process.wait(60) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("shell", SHELLS)
def test_a_signal_ends_the_hold_at_once(shell: str, number: int, tmp_path: Path) -> None:
    with started(shell, tmp_path, "exit 3") as process:
        assert line_of(process, '::dstack::{"kind":"held"')
        process.send_signal(number)
        assert process.wait(60) == 3


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_that_a_signal_has_ended_are_not_held(shell: str, tmp_path: Path) -> None:
    with started(shell, tmp_path, "sh -c 'echo started; exec sleep 600'") as process:
        assert line_of(process, "started")
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        assert "held" not in process.stdout.read()
        assert process.wait(60) != 0


@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize("shell", SHELLS)
def test_an_exempt_status_is_not_held(shell: str, reports: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reports": reports, "but_not": (7, 99)}
    with started(shell, tmp_path, "set -eu", "exit 99", **options) as process:
        assert "held" not in process.communicate(timeout=60)[0]
        assert process.returncode == 99
    with started(shell, tmp_path, "set -eu", "exit 9", **options) as process:
        Path(line_of(process, "To end it: touch ").removeprefix("To end it: touch ")).touch()
        assert process.wait(60) == 9


@pytest.mark.parametrize(
    ("left", "words"),
    [(60, r"(60|[45]\d) s, until max_duration ends the run"), (599, "9 min, until .*"), (700, "10 min")],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_what_is_left_of_max_duration_is_shown(shell: str, left: int, words: str, tmp_path: Path) -> None:
    with started(shell, tmp_path, "set -eu", "exit 3", max_seconds=left) as process:
        shown = line_of(process, "The commands exited")
        assert re.fullmatch(rf"The commands exited with status 3. The container is held for {words}\.", shown)
        payload = json.loads(line_of(process, "::dstack::").removeprefix("::dstack::"))
        assert min(600, left) - 20 <= payload["seconds"] <= min(600, left)
        Path(payload["done"]).touch()
        assert process.wait(60) == 3


@pytest.mark.parametrize("shell", SHELLS)
def test_a_run_that_max_duration_is_about_to_end_is_not_held(shell: str, tmp_path: Path) -> None:
    with started(shell, tmp_path, "exit 3", max_seconds=9) as process:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (3, "")
        assert re.search(r"10 s or more until max_duration, got \d s\. The container is not held\.", errors)


@pytest.mark.parametrize("shell", SHELLS)
def test_without_a_clock_the_hold_is_as_long_as_asked(shell: str, tmp_path: Path) -> None:
    with started(shell, tmp_path, "date() { return 1; }; exit 3", max_seconds=9) as process:
        assert "held for 10 min." in line_of(process, "The commands exited")
        Path(line_of(process, "To end it: touch ").removeprefix("To end it: touch ")).touch()
        assert process.wait(60) == 3


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("option", "5m", "[45] min, until"),
        ("configuration", 300, "[45] min, until"),
        ("profile", "5m", "[45] min, until"),
        ("option", "off", "10 min\\."),
        ("configuration", None, "10 min\\."),
    ],
)
def test_the_max_duration_that_counts(where: str, value: Any, words: str) -> None:
    configuration = {"type": "task", "commands": ["exit 3"]}
    options: dict[str, Any] = {"debug_on_failure": "10m"}
    if where == "configuration":
        configuration |= {"max_duration": value}
    elif where == "profile":
        options["profile"] = dstack.Profile(name="p", max_duration=value)
    else:
        options["max_duration"] = value
    with LocalServer(step_seconds=0.01) as server, server.client() as client:
        run = client.runs.submit(configuration, "train", **options)
        outcome = run.wait(60, poll_interval=0.1)
        assert outcome.debug_seconds == 600 if "10" in words else 200 < outcome.debug_seconds <= 300
        assert re.search(f"The container is held for {words}", b"".join(run.logs()).decode())
        run.stop(until="ended", timeout=60)


OUTCOME = Outcome(
    "train",
    "id",
    "main",
    RunStatus.RUNNING,
    None,
    None,
    "running",
    0.1,
    9.0,
    "a",
    "b",
    "c",
    2.0,
    "http://page",
)
HELD = {"exit_status": 3, "seconds": 1800, "done": "/tmp/done", "nodes": 2}


def test_the_outcome_of_a_held_run_is_that_of_its_commands() -> None:
    held = ReportedSoFar().with_hold("held", HELD, 0)
    outcome = OUTCOME.with_reports(held)
    assert (outcome.status, outcome.exit_status, outcome.debug_seconds) == (RunStatus.FAILED, 3, 1800)
    # Two nodes for half an hour.
    assert outcome.debug_cost == 2.0
    text = describe_failure(
        outcome, ["epoch 1", "The container is held for 30 min.", "To end it: touch /tmp/done"]
    )
    assert text.splitlines() == [
        "Run train failed: its command exited with status 3. See http://page ",
        "Correct the command or its input; the end of the log shows what went wrong (user.exit).",
        "Its container is held for 30 min, for at most 2.00 USD. "
        "To open a shell in it: python -m dstack_core attach train",
        "To end it earlier, stop the run, or in the container: touch /tmp/done",
        "The last log lines:",
        "  epoch 1",
    ]
    ended = OUTCOME.with_reports(held.with_hold("released", {"seconds": 36}, 0))
    assert (ended.debug_seconds, ended.debug_cost, ended.debug_command, ended.debug_done) == (
        36,
        0.04,
        "",
        "",
    )
    progress = Progress("train", reported=held)
    assert Progress.from_dict(progress.to_dict()).reported.held == {**HELD, "attempt": 0}


def test_the_command_of_a_held_node_names_it() -> None:
    outcome = OUTCOME.with_reports(ReportedSoFar().with_hold("held", {**HELD, "node": 1}, 0))
    assert outcome.debug_command == "python -m dstack_core attach train --node 1"


def test_the_first_node_and_the_latest_attempt_count() -> None:
    first = ReportedSoFar().with_hold("held", HELD, 0)
    assert first.with_hold("held", {**HELD, "exit_status": 1}, 0) == first
    assert first.with_hold("held", {**HELD, "exit_status": 1}, 1).held["exit_status"] == 1
    assert first.with_hold("released", {"seconds": 3}, 1) == first
