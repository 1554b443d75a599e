"""Every Prefect block of the documentation runs."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from prefect.exceptions import ObjectAlreadyExists

from dstack_core.local import LocalServer
from tests.docs.blocks import Block, blocks, check_outputs
from tests.docs.commands import check_options

from .machines import new_pool


@pytest.mark.parametrize("block", blocks("python prefect"), ids=str)
def test_blocks_run_as_printed(
    block: Block,
    prefect_server: str,
    dstack: LocalServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The embedded server's machine is this one, and a flow of @dstack needs its Python.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    script = tmp_path / "block.py"
    script.write_text(block.code)
    if 'work_pool_name="gpu"' in block.code:
        # A block of @dstack may have made it before.
        with suppress(ObjectAlreadyExists):
            new_pool("gpu")
    target = {
        "DSTACK_SERVER_URL": dstack.url,
        "DSTACK_PROJECT": dstack.project,
        "DSTACK_TOKEN": dstack.token,
        "PREFECT_API_URL": prefect_server,
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **target},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Prefect logs to stderr.
    check_outputs(block, done.stderr + done.stdout)


@pytest.mark.parametrize("block", blocks("shell prefect"), ids=str)
def test_commands_of_the_documentation_exist_with_their_options(block: Block) -> None:
    for line in block.code.splitlines():
        words = line.split()
        names = [word for word in words if not word.startswith("-")]
        command = names[:3] if names[0] == "prefect" else names[:2]
        check_options(command, [word for word in words if word.startswith("--")])
