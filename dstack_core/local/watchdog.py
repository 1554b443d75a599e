"""A small helper process that cleans up after a server that was killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from dstack_core.local import reaper
from dstack_core.local.process import PtyProcess

# How long the helper may take to clean up: killing takes at most 2 s, removing the directory a moment.
_CLOSE_SECONDS = 5.0


class Watchdog:
    """The helper process of one server, which knows the sessions of its jobs."""

    def __init__(self, directory: Path) -> None:
        self._server = str(uuid4())
        self._directory = directory
        self._helper: subprocess.Popen[bytes] | None = None

    def marker(self, job: str) -> str:
        """Return the ``NAME=value`` that the environment of a job carries."""
        return f"{reaper.MARKER}={self._server}.{job}"

    def start(self) -> None:
        """Start the helper unless it runs; call this before the first process, so that each is watched."""
        if self._helper is None:
            script = str(Path(reaper.__file__))
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-S", script, self._server, str(self._directory), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                env={},
            )

    def started(self, session: int) -> None:
        """Record a session."""
        self._send(f"+{session}\n")

    def ended(self, process: PtyProcess) -> None:
        """Record the end of a session; the system may reuse its id."""
        if process.started:
            self._send(f"-{process.pid}\n")

    def _send(self, line: str) -> None:
        if self._helper is not None and self._helper.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(self._helper.stdin.fileno(), line.encode())

    def close(self) -> None:
        """Let the helper kill what is left, remove the directory and end."""
        if self._helper is not None and self._helper.stdin is not None:
            self._helper.stdin.close()
            try:
                self._helper.wait(_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._helper.kill()
                self._helper.wait()
