"""An output that the documentation shows is what the program above it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from tests.docs.blocks import ROOT, Block, every_block

_BLOCKS = list(every_block())
# A page shows the output behind its program.
PAIRS = [(program, output) for program, output in pairwise(_BLOCKS) if output.info == "text output"]


def test_every_output_stands_behind_a_program() -> None:
    assert len(PAIRS) == sum(block.info == "text output" for block in _BLOCKS) > 0
    assert all(program.info == "python" and program.page == output.page for program, output in PAIRS)


@pytest.mark.parametrize(("program", "output"), PAIRS, ids=lambda block: str(block))
def test_a_program_prints_what_the_page_shows(program: Block, output: Block, tmp_path: Path) -> None:
    """``...`` stands for what differs from run to run."""
    with LocalServer() as server:
        done = subprocess.run(
            [sys.executable, "-c", program.code],
            env={
                "PATH": os.defpath,
                "HOME": str(tmp_path),
                "PYTHONPATH": str(ROOT),
                "DSTACK_SERVER_URL": server.url,
                "DSTACK_PROJECT": server.project,
                "DSTACK_TOKEN": server.token,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    shown = output.code.splitlines()
    printed = done.stdout.splitlines()
    assert len(printed) == len(shown), done.stdout
    for line, expected in zip(printed, shown, strict=True):
        pattern = ".+".join(map(re.escape, expected.split("...")))
        assert re.fullmatch(pattern, line), f"expected {expected!r}, got {line!r}"
