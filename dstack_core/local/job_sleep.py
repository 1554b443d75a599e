"""The ``sleep`` command of jobs in virtual time.

The problem: a job that sleeps for an hour takes an hour, and virtual time waits for it, because a job's
process counts as work.

The idea: while virtual time is on, jobs find another ``sleep`` first in their ``PATH``. It asks the server to
wait in virtual time, and while it waits the job does not count as work. All else in a job takes real time.

Run as a script, this file is that command. It is started with `python -I -S`, so it may import nothing but
the standard library.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path

PORT = "DSTACK_LOCAL_SLEEP"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def install(directory: Path) -> Path:
    """Write the command below a directory; return the directory for the ``PATH`` of jobs."""
    command = directory / "bin" / "sleep"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S '{Path(__file__)}' \"$@\"\n")
    command.chmod(0o755)
    return command.parent


def seconds_of(arguments: list[str]) -> float:
    """Return the sum of durations such as ``10``, ``1.5m`` or ``infinity``; raises ValueError."""
    if not arguments:
        raise ValueError
    return sum(
        float(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else float(text) for text in arguments
    )


def main(arguments: list[str], address: str) -> int:
    """Wait; return the exit status."""
    try:
        seconds = seconds_of(arguments)
    except ValueError:
        sys.stderr.write(f"sleep: invalid time interval: {' '.join(arguments)}\n")
        return 1
    port, _, job = address.partition("/")
    with (
        contextlib.suppress(OSError, ValueError),
        socket.create_connection(("127.0.0.1", int(port))) as server,
    ):
        server.sendall(f"{job} {seconds}\n".encode())
        if server.recv(1):
            return 0
    # The server is gone, or virtual time has ended.
    time.sleep(seconds)
    return 0


if __name__ == "__main__":
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:], os.environ.get(PORT, "")))
