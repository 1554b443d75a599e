"""The user's own commands begin at line 1 of their shell, whatever is put before them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from dstack_core._report.delivery import with_command
from dstack_core._report.hold import with_hold
from dstack_core._report.one_line import one_line
from dstack_core.models.configurations import Task

SHELLS = [shell for shell in ("sh", "bash", "dash", "ksh", "zsh") if shutil.which(shell)]
# Errors in the first command, in its second line and in the last command; then a broken line.
COMMANDS = ["no-such-1 || no-such-1\nno-such-2\ntrue", "no-such-3", "echo $LINENO"]
BROKEN = ["true\ntrue", "if; then"]


def stderr_of(shell: list[str], task: Task, folder: Path) -> list[str]:
    """Return the errors that the shell writes, in a session without a terminal."""
    ended = subprocess.run(
        [*shell, " && ".join(task.commands or [])],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(folder), "PS1": ""},
        check=False,
    )
    lines = ended.stderr.splitlines()
    # An interactive shell complains about its terminal first.
    return [line for line in lines if re.search("no-such|yntax error", line)]


@pytest.mark.parametrize("shell", [*([one, "-c"] for one in SHELLS), ["bash", "--norc", "-i", "-c"]])
@pytest.mark.parametrize("commands", [COMMANDS, BROKEN])
def test_errors_name_the_line_that_they_name_without_us(
    shell: list[str], commands: list[str], tmp_path: Path
) -> None:
    plain = Task(commands=commands)
    expected = stderr_of(shell, plain, tmp_path)
    assert len(expected) >= (1 if commands is BROKEN else 3)
    for reports, hold in product((False, True), (False, True)):
        task = with_command(plain) if reports else plain
        if hold:
            task = with_hold(task, 1, reports=reports)
        assert stderr_of(shell, task, tmp_path) == expected, (reports, hold)  # type: ignore[arg-type]


def test_no_command_of_ours_has_a_line_break() -> None:
    task = with_hold(with_command(Task(commands=["true"])), 60, reports=True)
    assert not any("\n" in command for command in task.commands or ())


def test_a_script_in_one_line_does_the_same() -> None:
    script = """
f() (
  if [ "$1" = 1 ]; then
    printf '%s ' one \\
"and more"
  else
    printf other
  fi
)
for i in 1 2
do
  f $i
done
"""
    assert "\n" not in one_line(script)
    for text in (script, one_line(script)):
        assert subprocess.check_output(["sh", "-c", text], text=True) == "one and more other"
