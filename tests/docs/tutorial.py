"""Follow a tutorial: run its commands in separate shells, with free ports instead of those it names."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import ROOT, Block, blocks_of

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "build" / "screenshots"))
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Tutorial:
    """The commands of a page, run with a separate home directory; ``ports`` replaces the ports that the page names."""

    page: Path
    home: Path
    ports: Mapping[str, int]
    settings: Mapping[str, str]

    def code(self, info: str) -> list[Block]:
        """Return the page's blocks of one kind."""
        return [block for block in blocks_of(self.page) if block.info == info]

    @contextlib.contextmanager
    def running(self, block: Block) -> Iterator[Path]:
        """Run the commands of a block in a shell until the ``with`` block ends; yield the file of their output."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        output = self.home / f"block-{block.line}.out"
        with output.open("wb") as stream:
            shell = subprocess.Popen(
                ["bash", "-euc", self.on_free_ports(block.code)],
                env=self.environment(),
                cwd=self.home,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield output
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    shell.wait(20)
                    break

    def run(self, block: Block) -> str:
        """Run the commands of a block to their end, check that they succeed, and return their output."""
        done = subprocess.run(
            ["bash", "-euc", self.on_free_ports(block.code)],
            env=self.environment(),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr + done.stdout

    def on_free_ports(self, text: str) -> str:
        """Return a text of the page with its ports replaced by those in use."""
        for port, free in self.ports.items():
            text = text.replace(port, str(free))
        return text

    def environment(self) -> dict[str, str]:
        """Return the shells' environment variables: of this process, only the paths to programs and sources."""
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "NO_PROXY": "127.0.0.1,localhost",
            "DO_NOT_TRACK": "1",
            **self.settings,
        }


def wait_for_address(url: str, output: Path) -> None:
    """Wait until an address answers with 200, or fail with the end of the output."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"{url} does not answer:\n{output.read_text()[-3000:]}")
