"""A user's project in a folder of its own: its files, and pytest run on them with the plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.docs.blocks import ROOT, Block, blocks_of

# The environments of the tests may have the plugin's entry point or not: it is loaded by its module.
PLUGIN = ("-p", "no:dstack", "-p", "dstack_core.testing.plugin")
# Their own plugins make pytest start slowly, or are not there for a user.
_QUIET = ("-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:hypothesispytest")
# The lowest version of starlette that is allowed imports a package by its old name.
_QUIET += ("-W", "ignore:Please use `import python_multipart` instead:PendingDeprecationWarning")


def files_of(page: Path, info: str) -> dict[str, str]:
    """Return the files that the blocks of a page are: the first line of each is a comment with its name."""
    found: dict[str, str] = {}
    for block in blocks_of(page):
        if block.info == info:
            found[_name(block)] = block.code
    assert found, f"{page}: no block {info!r}"
    return found


def _name(block: Block) -> str:
    match = re.match(r"# (\S+\.(?:py|ini|toml))\n", block.code)
    assert match, f"{block}: expected a comment with the file's name first"
    return match[1]


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write files, and the folders that they are in."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run_tests(
    folder: Path, *arguments: str, plugin: tuple[str, ...] = PLUGIN, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder and return what it printed."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DSTACK_", "PYTEST_", "COV_"))
    }
    paths = [str(ROOT), *(str(path) for path in ROOT.glob("providers/*/src"))]
    settings = {**kept, "PYTHONPATH": os.pathsep.join(paths), "HOME": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, *_QUIET, *arguments],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        timeout=280,
    )


def summary(done: subprocess.CompletedProcess[str]) -> str:
    """Return pytest's last line."""
    return re.sub(r" in [\d.]+s.*", "", done.stdout.strip().rpartition("\n")[2])
