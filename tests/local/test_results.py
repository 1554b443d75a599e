"""``$DSTACK_RESULT_FILE``: what commands write there is the run's result, if they succeed."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstack_core import Client, LogLines, NoResultError, Reported, RunFailedError
from dstack_core._report.delivery import command
from dstack_core.local import LocalServer
from dstack_core.models.reports import DEFAULT_MAX_BYTES

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with LocalServer(step_seconds=0.01) as server, server.client() as client:
        yield client


def run(client: Client, *commands: str, reports: bool | None = True, **fields: Any) -> tuple[Any, list[str]]:
    """Return the outcome of a run with these commands, and its log lines."""
    configuration = {"type": "task", "commands": list(commands), **fields}
    submitted = client.runs.submit(configuration, f"result-{next(_numbers)}", reports=reports)
    lines: list[str] = []
    events = submitted.follow(poll_interval=0.05)
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value, lines
        if isinstance(event, LogLines):
            lines += event.lines


WRITE = 'echo \'{"loss": 0.25}\' > "$DSTACK_RESULT_FILE"'


@pytest.mark.parametrize("shell", [None, "sh", "bash"])
@pytest.mark.parametrize(
    "commands",
    [
        (WRITE,),
        ("echo start", WRITE, "echo end"),
        ("set -e", WRITE),
        ("set -eu", WRITE, "exit 0"),
        ("set -C", WRITE),
        (f"sh -c '{WRITE.replace(chr(39), chr(39) + chr(92) + chr(39) + chr(39))}'",),
        (WRITE, "false || true"),
        ("cd /", WRITE),
        (f"{WRITE} # the result",),
        (WRITE, "sleep 0 &"),
    ],
    ids=str,
)
def test_the_content_is_the_result(client: Client, shell: str | None, commands: tuple[str, ...]) -> None:
    fields: dict[str, Any] = {} if shell is None else {"shell": shell}
    outcome, lines = run(client, *commands, **fields)
    assert (outcome.has_result, outcome.result) == (True, {"loss": 0.25})
    assert not [line for line in lines if "dstack" in line]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    ("commands", "status"), [((WRITE, "exit 7"), 7), (("set -e", WRITE, "false"), 1), ((WRITE, "nope"), 127)]
)
def test_a_failing_command_has_no_result(
    client: Client, shell: str, commands: tuple[str, ...], status: int
) -> None:
    outcome, _ = run(client, *commands, shell=shell)
    assert (outcome.has_result, outcome.exit_status) == (False, status)


def test_without_a_file_nothing_is_reported(client: Client) -> None:
    outcome, lines = run(client, "echo done")
    assert (outcome.has_result, outcome.succeeded, lines) == (False, True, ["done"])


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_large_result_comes_in_parts(client: Client, shell: str, tmp_path: Path) -> None:
    value = {"text": "ä b" * 60_000, "list": list(range(5000))}
    (tmp_path / "value.json").write_text(json.dumps(value, indent=1, ensure_ascii=False))
    outcome, lines = run(client, f"cat {tmp_path}/value.json > $DSTACK_RESULT_FILE", shell=shell)
    assert outcome.result == value
    assert lines == []


def test_the_largest_result_is_kept(client: Client, tmp_path: Path) -> None:
    (tmp_path / "value.json").write_text(json.dumps("x" * (DEFAULT_MAX_BYTES - 2)))
    outcome, _ = run(client, f"cat {tmp_path}/value.json > $DSTACK_RESULT_FILE")
    assert len(outcome.result) == DEFAULT_MAX_BYTES - 2


@pytest.mark.parametrize("last", ["true", "exit 3"])
def test_the_file_is_removed(client: Client, tmp_path: Path, last: str) -> None:
    run(client, WRITE, f'echo "$DSTACK_RESULT_FILE" > {tmp_path}/name', last)
    assert not Path((tmp_path / "name").read_text().strip()).exists()


def test_a_folder_in_place_of_the_file_is_left_alone(client: Client) -> None:
    outcome, lines = run(
        client, "mkdir $DSTACK_RESULT_FILE", "rmdir $DSTACK_RESULT_FILE; mkdir $DSTACK_RESULT_FILE"
    )
    assert (outcome.has_result, outcome.succeeded, lines) == (False, True, [])


def test_a_result_that_is_too_large_fails_the_run(client: Client, tmp_path: Path) -> None:
    (tmp_path / "value.json").write_text(json.dumps("x" * (DEFAULT_MAX_BYTES + 1)))
    outcome, lines = run(client, f"cat {tmp_path}/value.json > $DSTACK_RESULT_FILE")
    assert (outcome.has_result, outcome.exit_status) == (False, 1)
    assert "expected at most 1048576 bytes" in lines[-1]


def test_content_that_is_not_json_is_shown_as_text(client: Client) -> None:
    outcome, lines = run(client, "echo 'not JSON' > $DSTACK_RESULT_FILE")
    assert (outcome.has_result, outcome.succeeded) == (False, True)
    assert "not JSON" in lines[-1]


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_a_bare_shell_reports(shell: str, tmp_path: Path) -> None:
    content = '{"a": "b",\r\n "c": 1}\n'
    (tmp_path / "source").write_bytes(content.encode())
    script = (
        f"{command()} && {{ while IFS= read -r line; do printf '%s\\n' \"$line\"; done; }} "
        f"< {tmp_path}/source > $DSTACK_RESULT_FILE"
    )
    done = subprocess.run(
        [f"/bin/{shell}", "-c", script],
        env={"PATH": str(tmp_path / "none"), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert json.loads(line.removeprefix("::dstack::")) == {"kind": "result", "value": {"a": "b", "c": 1}}


def test_only_the_first_node_reports(client: Client) -> None:
    outcome, _ = run(client, 'echo "$DSTACK_NODE_RANK" > $DSTACK_RESULT_FILE', "sleep 0.3", nodes=2)
    assert outcome.result == 0


@pytest.mark.parametrize("reports", [None, False])
def test_without_the_option_the_commands_are_sent_as_they_are(client: Client, reports: bool | None) -> None:
    outcome, lines = run(client, 'echo "file: $DSTACK_RESULT_FILE"', reports=reports)
    assert (outcome.has_result, lines) == (False, ["file: "])


def test_a_line_of_its_own_needs_no_option(client: Client) -> None:
    outcome, lines = run(client, """echo '::dstack::{"kind": "metric", "loss": 0.5}'""", reports=None)
    assert (outcome.metrics, lines) == ({"loss": 0.5}, [])


def test_the_module_is_on_the_path_of_python(client: Client) -> None:
    script = "import dstack_report; dstack_report.metric(step=1, loss=0.5); dstack_report.result([1])"
    submitted = client.runs.submit(
        {
            "type": "task",
            "commands": ["export PYTHONPATH=/before", f'python3 -c "{script}"'],
            "env": {"A": "b"},
        },
        "module",
        reports=True,
    )
    # The user's own path replaces it: it is then as on any machine.
    with pytest.raises(RunFailedError):
        submitted.result(poll_interval=0.05)
    submitted = client.runs.submit(
        {"type": "task", "commands": [f'python3 -c "{script}"'], "env": {"PYTHONPATH": "/before"}},
        "module",
        reports=True,
    )
    kinds = [event.kind for event in submitted.follow(poll_interval=0.05) if isinstance(event, Reported)]
    assert kinds == ["metric", "result"]
    assert submitted.result(poll_interval=0.05) == [1]


def test_the_error_without_a_result_names_the_option(client: Client) -> None:
    submitted = client.runs.submit({"type": "task", "commands": ["true"]}, "none")
    with pytest.raises(NoResultError, match="reports=True"):
        submitted.result(poll_interval=0.05, sleep=lambda seconds: None)


def test_other_entrypoints_and_shells_are_left_alone(client: Client) -> None:
    outcome, lines = run(client, "hello", entrypoint="/bin/echo")
    assert (outcome.succeeded, lines) == (True, ["hello"])


def test_a_first_command_with_a_background_process(client: Client) -> None:
    outcome, _ = run(client, 'true & echo 1 > "$DSTACK_RESULT_FILE"; wait', "cd /")
    assert (outcome.exit_status, outcome.result) == (0, 1)
