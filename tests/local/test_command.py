"""The command line, on the embedded server: as a process where a terminal matters, else by its function."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._command.log_text import without_messages
from dstack_core._command.main import main
from dstack_core.local import LocalServer
from dstack_core.local.process import OPEN_TERMINAL
from dstack_core.models.records import LogBytes
from tests.local.support import wait_until
from tests.ports import free_port


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer(step_seconds=0.01, stop_grace_seconds=0.5) as server:
        yield server


@pytest.fixture(autouse=True)
def environment(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_SERVER_URL", server.url)
    monkeypatch.setenv("DSTACK_PROJECT", server.project)
    monkeypatch.setenv("DSTACK_TOKEN", server.token)


@pytest.fixture
def client(server: LocalServer) -> Iterator[dstack.Client]:
    with server.client() as client:
        yield client
        for run in client.runs.list():
            if run.last_status.is_active:
                run.stop(abort=True, until="ended", timeout=30)


def started(client: dstack.Client, name: str, *commands: str, **fields: Any) -> dstack.Run:
    run = client.runs.submit(dstack.Task(commands=list(commands), **fields), name)
    events = run.follow(poll_interval=0.05)
    while run.last_status.is_active and run.last_status != "running":
        next(events)
    return run


def shown(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capfd.readouterr()
    return status, out, err


def test_runs_are_listed(client: dstack.Client, capfd: pytest.CaptureFixture[str]) -> None:
    done = started(client, "list-done", "true").wait(60, poll_interval=0.05)
    started(client, "list-active", "sleep 300")
    status, out, _ = shown(capfd, "ps")
    assert status == 0
    assert out.splitlines()[0].split() == ["NAME", "STATUS", "AGE", "COST", "OWNER", "MESSAGE"]
    assert "list-active" in out
    assert "list-done" not in out
    _, out, _ = shown(capfd, "ps", "--all", "-o", "json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["list-done"]["cost"] == pytest.approx(done.cost)
    assert rows["list-active"]["status"] == "running"


def test_an_empty_list_is_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with LocalServer() as other:
        os.environ.update(DSTACK_SERVER_URL=other.url, DSTACK_TOKEN=other.token)
        assert shown(capfd, "ps") == (0, "Project main has no active runs.\n", "")
        assert shown(capfd, "ps", "-o", "json") == (0, "[]\n", "")


def test_a_log_is_printed_as_it_is(client: dstack.Client, capfd: pytest.CaptureFixture[str]) -> None:
    run = client.runs.submit(dstack.Task(commands=["echo one", "sleep 1", "echo two"]), "logs")
    assert shown(capfd, "logs", "-f", "logs") == (0, "one\r\ntwo\r\n", "")
    run.wait(60, poll_interval=0.05)
    assert shown(capfd, "logs", "logs") == (0, "one\r\ntwo\r\n", "")
    status, _, err = shown(capfd, "logs", "missing")
    assert status == 1
    assert "has no run missing. List the runs" in err


def test_messages_are_left_out_of_a_log(client: dstack.Client, capfd: pytest.CaptureFixture[str]) -> None:
    message = '::dstack::{"kind":"metric","loss":1}'
    task = dstack.Task(commands=["printf 'half'", "sleep 1", f"echo ' a line'; echo '{message}'; echo end"])
    run = client.runs.submit(task, "messages")
    assert shown(capfd, "logs", "-f", "messages") == (0, "half a line\r\nend\r\n", "")
    run.wait(60, poll_interval=0.05)
    assert message in shown(capfd, "logs", "messages", "--raw")[1]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_messages_are_left_out_however_a_log_is_cut(size: int) -> None:
    log = b'one\r\n::dstack::{"kind":"metric","loss":1}\r\n 50%\r::dstack is text\r\n::dstack::{broken\r\nend'
    chunks = [LogBytes(log[at : at + size], submission_id="1") for at in range(0, len(log), size)]
    assert b"".join(without_messages(chunks)) == (
        b"one\r\n 50%\r::dstack is text\r\n::dstack::{broken\r\nend"
    )


def test_runs_are_stopped(client: dstack.Client, capfd: pytest.CaptureFixture[str]) -> None:
    started(client, "stop-me", "sleep 300")
    status, out, _ = shown(capfd, "stop", "stop-me", "stop-missing")
    assert status == 1
    assert out.splitlines()[1] == f"Project main on {client.server_url} has no run stop-missing to stop."
    run = client.runs.get("stop-me")
    assert run is not None
    assert not run.last_status.is_active


def test_offers(client: dstack.Client, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = shown(capfd, "offers", "--gpu", "A100:2")
    assert status == 0
    assert out.splitlines()[0].split() == ["BACKEND", "REGION", "INSTANCE", "KIND", "PRICE", "AVAILABILITY"]
    status, out, _ = shown(capfd, "offers", "--gpu", "H100")
    assert status == 1
    assert out.startswith("No machine is on offer.")


def test_costs(client: dstack.Client, capfd: pytest.CaptureFixture[str]) -> None:
    for number, team in enumerate(("nlp", "nlp", "vision")):
        started(client, f"cost-{number}", "true", tags={"team": team}).wait(60, poll_interval=0.05)
    status, out, _ = shown(capfd, "cost", "--by", "tag:team", "-o", "json", "--since", "1h")
    runs = {row["group"]: row["runs"] for row in json.loads(out)}
    assert (status, runs["nlp"], runs["vision"]) == (0, 2, 1)
    _, out, _ = shown(capfd, "cost", "--by", "name")
    assert out.splitlines()[-1].startswith("TOTAL")


def test_doctor(
    client: dstack.Client, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = shown(capfd, "doctor")
    assert status == 0
    assert "ok       token: " in out
    monkeypatch.setenv("DSTACK_TOKEN", "wrong")
    status, out, _ = shown(capfd, "doctor", "-o", "json")
    assert status == 1
    assert json.loads(out)[-1]["check"] == "token"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["ps", "--", "sh"], ["attach"]])
def test_wrong_arguments(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capfd.readouterr().err


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dstack_core", *arguments]


def test_a_command_runs_in_the_container(client: dstack.Client) -> None:
    started(client, "enter", "export LATER=1", "sleep 300", env={"FOO": "a b"})
    script = 'cat; echo "$FOO"; pwd; echo wrong >&2; exit 7'
    ended = subprocess.run(
        command("attach", "enter", "--", "sh", "-c", script),
        input=b"given\n",
        capture_output=True,
        check=False,
    )
    given, foo, where = ended.stdout.decode().splitlines()
    assert (given, foo, ended.stderr, ended.returncode) == ("given", "a b", b"wrong\n", 7)
    assert where.endswith("/workflow")
    ended = subprocess.run(
        command("attach", "enter"), input=b"echo from a pipe; exit 3\n", capture_output=True, check=False
    )
    assert (ended.stdout, ended.returncode) == (b"from a pipe\n", 3)


def test_a_run_that_has_ended_has_no_container(
    client: dstack.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    started(client, "ended", "true").wait(60, poll_interval=0.05)
    status, _, err = shown(capfd, "attach", "ended")
    assert (status, err) == (1, "Run ended has ended; there is no container to enter.\n")


class Terminal:
    """A process on a terminal, as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self.fd, other_end = pty.openpty()
        # Its session opens the terminal by itself; a fork beside the threads of these tests could hang.
        opened = ["/bin/sh", "-c", OPEN_TERMINAL, os.ttyname(other_end), *command(*arguments)]
        self.process = subprocess.Popen(
            opened, stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True
        )
        os.close(other_end)
        self.output = b""

    def write(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output.decode(errors="replace")):
            left = deadline - time.monotonic()
            assert left > 0, self.output
            if select.select([self.fd], [], [], left)[0]:
                self.output += os.read(self.fd, 65536)
        text, self.output = self.output.decode(errors="replace"), b""
        return text

    def end(self) -> int:
        try:
            while os.read(self.fd, 65536):
                pass
        except OSError:
            pass
        os.close(self.fd)
        return self.process.wait(60)


def test_a_shell_on_a_terminal(client: dstack.Client) -> None:
    run = started(client, "terminal", "sleep 300")
    terminal = Terminal("attach", "terminal")
    terminal.read_until("leave it with exit")
    terminal.write("tty; stty size; echo run=$DSTACK_RUN_NAME\n")
    terminal.read_until(r"/dev/pts/\d+[\s\S]*\d+ \d+[\s\S]*run=terminal")
    # Ctrl-C ends the command in the container, not this process.
    # The command itself shows that it runs: a Ctrl-C before the shell has given it the terminal is lost.
    terminal.write("sh -c 'echo begin; exec sleep 300'; echo end=$?\n")
    terminal.read_until(r"begin\r\n")
    terminal.write("\x03")
    terminal.write("echo after=$?\n")
    terminal.read_until(r"after=130")
    terminal.write("exit 5\n")
    assert terminal.end() == 5
    run.refresh()
    assert run.last_status == "running"


def test_the_end_of_the_run_ends_the_shell(client: dstack.Client) -> None:
    run = started(client, "cut", "sleep 300")
    terminal = Terminal("attach", "cut")
    terminal.write("echo ready=$((1 + 1))\n")
    terminal.read_until("ready=2")
    run.stop(abort=True, until="ended", timeout=30)
    assert terminal.end() in (255, 137, 128 + signal.SIGKILL, 1)


def test_leaving_a_shell_leaves_nothing_behind(client: dstack.Client) -> None:
    run = started(client, "leave", "sleep 300")
    terminal = Terminal("attach", "leave")
    terminal.write("echo pid=$$\n")
    pid = int(re.search(r"pid=(\d+)", terminal.read_until(r"pid=\d+")).group(1))  # type: ignore[union-attr]
    os.kill(terminal.process.pid, signal.SIGKILL)
    terminal.end()
    assert wait_until(lambda: not _is_alive(pid), 30)
    run.refresh()
    assert run.last_status == "running"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            "cost --by colour",
            "argument --by: expected owner, dag, flow, task, user, gpu, name, status, day or tag:KEY, got 'colour'",
        ),
        (
            "cost --since soon",
            "argument --since: expected a duration such as 7d or 12h, or a date such as 2026-11-30, got 'soon'",
        ),
        ("offers --limit 0", "argument -n/--limit: expected a whole number, 1 or more, got 0"),
        ("offers --max-price nan", "argument --max-price: expected a number greater than 0, got nan"),
        ("stop a --timeout=-1", "argument --timeout: expected a number greater than 0, got -1"),
        ("logs a --node=-1", "argument --node: expected a whole number, 0 or more, got -1"),
        ("attach a --node x", "argument --node: expected a whole number, 0 or more, got x"),
    ],
)
def test_a_wrong_value_of_an_argument_is_named(
    arguments: str, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 2
    assert text in capfd.readouterr().err


@pytest.mark.parametrize("command", [["ps"], ["ps", "--all", "-o", "json"], ["cost"]])
def test_a_project_that_does_not_exist_is_an_error(
    command: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTACK_PROJECT", "nope")
    status, out, err = shown(capfd, *command)
    assert (status, out) == (1, "")
    assert "nope" in err


def test_a_run_that_is_held_is_listed_as_held(
    client: dstack.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    task = dstack.Task(commands=["exit 3"])
    run = client.runs.submit(task, "held", debug_on_failure=600)
    assert run.wait(60, poll_interval=0.05).debug_command
    started(client, "not-yet-held", "sleep 300")
    rows = {row["name"]: row for row in json.loads(shown(capfd, "ps", "-o", "json")[1])}
    assert rows["held"]["message"] == "held for a shell"
    assert rows["not-yet-held"]["message"] != "held for a shell"
    (line,) = [line for line in shown(capfd, "ps")[1].splitlines() if line.startswith("held ")]
    assert line.endswith("held for a shell")


def test_a_server_that_is_away_is_an_error_within_seconds(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTACK_SERVER_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    status, out, err = shown(capfd, "ps")
    # The retry budget of a task is 30 s and more.
    assert time.monotonic() - started < 20
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "127.0.0.1" in err


@pytest.mark.parametrize(
    ("redirection", "status", "words"),
    [
        (">&-", 0, ""),
        ("> /dev/full", 1, "The output could not be written: No space left on device.\n"),
        ("| head -c 4 > /dev/null", 1, ""),
    ],
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")  # noqa: PTH110 - a device
def test_output_that_cannot_be_written(redirection: str, status: int, words: str) -> None:
    line = f"{shlex.join(command('doctor'))} {redirection}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (ended.stderr, ended.returncode) == (words, status)


def test_an_encoding_that_lacks_a_character(client: dstack.Client) -> None:
    run = client.runs.submit(dstack.Task(commands=["true"]), "ascii", marker="airflow:dddé/r/t")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        command("ps", "--all"), env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert "ddd?" in ended.stdout
    assert run.name in ended.stdout


def test_an_interrupted_log_ends_without_a_traceback(client: dstack.Client) -> None:
    started(client, "interrupted", "echo begin", "sleep 300")
    process = subprocess.Popen(
        command("logs", "-f", "interrupted"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begin\r\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) == (b"", 130)


def test_the_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert shown(capfd, "--version") == (0, f"dstack-core {dstack.__version__}\n", "")


def test_a_terminal_has_colors_unless_they_are_switched_off(
    client: dstack.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(client, "colored", "sleep 300")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal("ps")
    assert "\x1b[32mrunning\x1b[0m" in terminal.read_until("colored.*")
    terminal.end()
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal("ps")
    assert "\x1b[" not in terminal.read_until("colored.*")
    terminal.end()
