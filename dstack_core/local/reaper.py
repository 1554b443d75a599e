"""Find and kill all processes of a job, whatever process groups and sessions they created.

A process belongs to a job if it is in the job's session, or if its environment contains the job's marker: a
daemon leaves the session, but inherits the environment. A process that forks while it is being killed may
leave a child behind, so the search and the kill are repeated until nothing is found.

Run as a script, this file is the watchdog of one server: it waits until the server has ended, even by
SIGKILL, then kills what the server started and removes its temporary directory. It detects the end in two
ways: its standard input, a pipe from the server, closes; or its parent process changes. The pipe alone is not
enough, because a process forked from the server keeps it open. The sessions come over the same pipe. The
watchdog is started by its path with `python -I -S`, so it may import nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

MARKER = "DSTACK_LOCAL_SERVER"


# Where Linux shows its processes. Elsewhere ``ps`` lists them and ``getsid`` returns the session of each;
# what macOS shows of their environments is not enough to find a daemon, which leaves the session of its job.
_PROC = Path("/proc")
_PS = ("/bin/ps", "-A", "-o", "pid=,stat=")


def _session_and_state(pid: int) -> tuple[int, str] | None:
    try:
        # The command name may contain spaces and parentheses, so count the fields after the last parenthesis.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[3]), fields[0]


def _carries(pid: int, marker: bytes) -> bool:
    try:
        return any(
            entry.startswith(marker) for entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        )
    except OSError:
        return False


def members(sessions: Iterable[int], marker: str | None = None) -> list[int]:
    """Return the live processes of the sessions, and those with a variable that begins with the marker.

    Without /proc (not Linux) only the processes of the sessions are found.
    """
    wanted = set(sessions)
    if not (_PROC / "self/stat").exists():
        return _members_without_proc(wanted)
    found = []
    for entry in os.listdir(_PROC):  # noqa: PTH208 - names only, thousands of Path objects are slow
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        stat = _session_and_state(int(entry))
        if stat is None or stat[1] in "ZX":
            continue
        if stat[0] in wanted or (marker is not None and _carries(int(entry), marker.encode())):
            found.append(int(entry))
    return found


def _members_without_proc(wanted: set[int]) -> list[int]:
    if not wanted:
        return []
    try:
        listed = subprocess.run(_PS, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    states = dict(line.split()[:2] for line in listed.splitlines())
    # Without ps the leaders alone. A process that has their id but leads no session got it later.
    pids = [int(pid) for pid, state in states.items() if state[0] not in "ZX"] if states else wanted
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.getsid(pid) in (wanted if states else {pid}) and pid != os.getpid():
                found.append(pid)
    return sorted(found)


def kill_all(sessions: Iterable[int], marker: str | None = None) -> None:
    """Kill the processes that `members` finds, repeatedly until none is left, for at most 2 seconds."""
    wanted = set(sessions)
    # A process that survives SIGKILL for 2 s hangs in the kernel; waiting longer would only delay the end of
    # the job.
    deadline = time.monotonic() + 2
    while (found := members(wanted, marker)) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        # A killed process stays in /proc for a moment, and one that forks may have created another meanwhile.
        time.sleep(0.002)


def watch(server: str, directory: str, parent: int) -> None:
    """Wait for the end of the parent process or of standard input, then clean up after it.

    Lines ``+ID`` and ``-ID`` on standard input report sessions that started and ended.
    """
    sessions: set[int] = set()
    pending = b""
    while True:
        # A process forked from the server keeps the pipe open, so check the parent twice a second as well.
        # Always read what the pipe holds: the server may have ended before this process began to read.
        gone = os.getppid() != parent
        if not select.select([0], [], [], 0 if gone else 0.5)[0]:
            if gone:
                break
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            (sessions.add if line[:1] == b"+" else sessions.discard)(int(line[1:]))
    kill_all(sessions, f"{MARKER}={server}")
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2], int(sys.argv[3]))
