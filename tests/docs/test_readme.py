"""The Python program of the README prints the output that is shown below it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from dstack_core.local import LocalServer
from tests.docs.blocks import ROOT, every_block


def without_numbers(text: str) -> list[str]:
    """Return the lines; the last one has a duration and a cost, which differ from run to run."""
    *lines, last = text.splitlines()
    return [*lines, re.sub(r"\d[\d.]*", "N", last)]


def test_the_output_of_the_python_program_is_the_one_shown(tmp_path: Path) -> None:
    blocks = [block for block in every_block() if block.page == ROOT / "README.md"]
    place = next(number for number, block in enumerate(blocks) if block.info == "python")
    program, output = blocks[place : place + 2]
    assert output.info == ""
    with LocalServer() as server:
        done = subprocess.run(
            [sys.executable, "-c", program.code],
            env={
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "HOME": str(tmp_path),
                "PYTHONPATH": str(ROOT),
                "DSTACK_SERVER_URL": server.url,
                "DSTACK_PROJECT": server.project,
                "DSTACK_TOKEN": server.token,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert without_numbers(done.stdout) == without_numbers(output.code)
