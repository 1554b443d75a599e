"""The blocks of the guide to the task runners of Dask and Ray run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from tests.docs.blocks import Block, blocks, check_outputs

pytestmark = [pytest.mark.runners, pytest.mark.timeout(600)]


@pytest.mark.parametrize("block", blocks("python prefect runners"), ids=str)
def test_blocks_run_as_printed(
    block: Block, prefect_server: str, dstack: LocalServer, tmp_path: Path
) -> None:
    script = tmp_path / "block.py"
    script.write_text(block.code)
    environment = {
        **os.environ,
        "DSTACK_SERVER_URL": dstack.url,
        "DSTACK_PROJECT": dstack.project,
        "DSTACK_TOKEN": dstack.token,
        "PREFECT_API_URL": prefect_server,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # Ray's start fails on a machine that is busy for 30 s; then it is tried again.
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, str(script)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if done.returncode == 0 or "ray.init" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    check_outputs(block, done.stderr + done.stdout)
