"""Check the commands of the documentation against the help texts of the programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def check_options(command: Sequence[str], options: Sequence[str]) -> None:
    """Check that a program of this environment has that command, and that its help names the options."""
    program, *words = command
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *words, "--help"],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in options:
        assert option in done.stdout, f"{' '.join(command)} {option}"
