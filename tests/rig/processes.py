"""Find and end processes by their ids."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ProcessInfo:
    """A live process as the kernel shows it; times in seconds, memory in bytes."""

    pid: int
    session: int
    cpu_seconds: float
    memory_bytes: int


def _inspect(entry: Path) -> ProcessInfo | None:
    try:
        # The command name may contain spaces and parentheses, so the fixed fields start after the last parenthesis.
        fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    if not fields or fields[0] in "ZX":
        return None
    ticks = int(fields[11]) + int(fields[12])
    return ProcessInfo(int(entry.name), int(fields[3]), ticks / _CLOCK_TICKS, int(fields[21]) * _PAGE_BYTES)


def live_processes() -> list[ProcessInfo]:
    """List the processes of this machine, without zombies."""
    entries = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [info for entry in entries if (info := _inspect(entry)) is not None]


def in_session(leader: int) -> list[ProcessInfo]:
    """List the processes of a session, whose leader may have ended already."""
    return [info for info in live_processes() if info.session == leader]


def belonging_to(folder: Path) -> list[int]:
    """List the processes whose environment points into a folder, without the caller."""
    wanted = f"{folder}/".encode()
    found = []
    for info in live_processes():
        with contextlib.suppress(OSError):
            if info.pid != os.getpid() and wanted in Path(f"/proc/{info.pid}/environ").read_bytes():
                found.append(info.pid)
    return found


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes, some of which may have ended already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(folder: Path, session: int | None = None, patience: float = 10.0) -> None:
    """Kill the processes that belong to a folder, or to a session, until none is left.

    Killing once is not enough, because a process may fork between the listing and the signal.
    """
    deadline = time.monotonic() + patience
    while True:
        members = in_session(session) if session is not None else []
        pids = {info.pid for info in members} | set(belonging_to(folder))
        if not pids:
            return
        send(pids, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes survive SIGKILL: {sorted(pids)}")
        time.sleep(0.01)


def end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Terminate a process, then kill its group, which it must lead."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(patience)


def start_cleaner(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that removes the folder, and kills what belongs to it, when its standard input closes.

    That also happens when this process is killed and can no longer clean up.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(folder)],
        stdin=subprocess.PIPE,
        env={"PATH": os.defpath},
        start_new_session=True,
    )


def _clean(folder: Path) -> None:
    sys.stdin.buffer.read()
    try:
        kill_all(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _clean(Path(sys.argv[1]))
