"""One job: a process session of its own on a pseudo terminal."""

from __future__ import annotations

import codecs
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path

from tests.rig import processes
from tests.rig.journal import Journal

# The time between SIGINT and SIGKILL in the real runner (PROTOCOL 1.7).
GRACE_SECONDS = 10.0
_LEADER = Path(__file__).with_name("session_leader.py")
_READ_BYTES = 65536
# Seconds. After the last process of the job has ended, no process holds the terminal, so the reader ends at once.
_READER_PATIENCE = 10.0


class Job:
    """A command whose output and end are written into a journal.

    `folder` belongs to the job alone: processes that left the session are found by its path in their environment.
    """

    def __init__(self, journal: Journal, folder: Path) -> None:
        self._journal = journal
        self._folder = folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end_reason: str | None = None
        self._timers: list[threading.Timer] = []
        self._ended = threading.Event()

    @property
    def pid(self) -> int | None:
        """Return the session id, None before the start."""
        return self._process.pid if self._process is not None else None

    def start(
        self, argv: Sequence[str], env: Mapping[str, str], directory: Path, max_seconds: float | None
    ) -> None:
        """Start the command unless a stop request came before."""
        with self._lock:
            if self._end_reason is not None:
                return
            master, slave = pty.openpty()
            command = [sys.executable, "-I", "-S", str(_LEADER), *argv]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=slave,
                    stdout=slave,
                    stderr=slave,
                    cwd=directory,
                    env=dict(env),
                    start_new_session=True,
                )
            except BaseException:
                os.close(master)
                raise
            finally:
                os.close(slave)
            self._journal.state("running")
            reader = threading.Thread(target=self._read, args=(master, self._process), daemon=True)
            reader.start()
            threading.Thread(target=self._wait, args=(self._process, reader), daemon=True).start()
            if max_seconds is not None:
                self._after(max_seconds, lambda: self.stop("max_duration_exceeded"))

    def stop(self, reason: str = "terminated_by_user", grace: float = GRACE_SECONDS) -> None:
        """Interrupt every process of the job, and kill those that are left after the grace (seconds)."""
        with self._lock:
            if self._end_reason is not None or self._ended.is_set():
                return
            self._end_reason = reason
            if self._process is None:
                self._journal.state("terminated", final=True, termination_reason=reason)
                self._ended.set()
                return
            pid = self._process.pid
            self._after(grace, lambda: processes.kill_all(self._folder, pid))
        processes.send([info.pid for info in processes.in_session(pid)], signal.SIGINT)

    def fail(self, reason: str, message: str) -> None:
        """Write an end with an error into the journal of a job that could not start."""
        self._journal.state("failed", final=True, termination_reason=reason, termination_message=message)
        self._ended.set()

    def kill(self, patience: float = 20.0) -> None:
        """Kill every process of the job and wait until it has ended."""
        with self._lock:
            if self._end_reason is None:
                self._end_reason = "terminated_by_server"
            process = self._process
        if process is None:
            self._journal.state("terminated", final=True, termination_reason=self._end_reason)
            return
        processes.kill_all(self._folder, process.pid)
        if not self._ended.wait(patience):
            raise TimeoutError(f"the job of session {process.pid} did not end")

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _read(self, master: int, process: subprocess.Popen[bytes]) -> None:
        """Write the output into the journal, never splitting a character between two messages."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with open(master, "rb", buffering=0) as terminal:
            while chunk := self._gather(terminal):
                self._journal.log(chunk, decoder.decode(chunk).encode())
            # Some programs close their terminal before they end; closing this side then would kill them.
            process.wait()
        if text := decoder.decode(b"", final=True):
            self._journal.log(b"", text.encode())

    def _gather(self, terminal: FileIO) -> bytes:
        """Read what is available; many small writes become one message, or timestamps would outrun the clock."""
        gathered = b""
        while len(gathered) < _READ_BYTES:
            if gathered and not select.select([terminal], [], [], self._journal.ahead())[0]:
                break
            try:
                chunk = terminal.read(_READ_BYTES)
            except OSError:  # the last process that held the terminal has ended
                break
            if not chunk:
                break
            gathered += chunk
        return gathered

    def _wait(self, process: subprocess.Popen[bytes], reader: threading.Thread) -> None:
        code = process.wait()
        processes.kill_all(self._folder, process.pid)
        reader.join(_READER_PATIENCE)
        with self._lock:
            for timer in self._timers:
                timer.cancel()
            if self._end_reason is not None:
                self._journal.state("terminated", final=True, termination_reason=self._end_reason)
            elif code == 0:
                self._journal.state("done", final=True, termination_reason="done_by_runner", exit_status=0)
            else:
                self._journal.state(
                    "failed",
                    final=True,
                    termination_reason="container_exited_with_error",
                    exit_status=code if code > 0 else -1,
                )
            self._ended.set()
