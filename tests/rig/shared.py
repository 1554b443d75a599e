"""Run a command with one dstack server for all its processes: `python -m tests.rig.shared -- pytest -n 4 ...`.

Each process that needs a server finds it by an environment variable, and creates a project and hosts of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.rig import processes
from tests.rig.server_process import DEFAULT_VERSION, ServerProcess

# An upper bound for a busy machine; the wait returns as soon as the command has ended.
_END_SECONDS = 30.0


def main() -> int:
    """Start the server, run the command, end the server and return the command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.rig.shared", description=__doc__)
    parser.add_argument("--version", default=DEFAULT_VERSION, help="the server to start")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    options = parser.parse_args()
    # Handle the signal, so that the command and the server are ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="rig-"))
    cleaner = processes.start_cleaner(folder)
    server = ServerProcess(options.version, folder, images=True)
    try:
        server.start()
        variables = {"DSTACK_TEST_SERVER_VERSION": options.version, **server.address.variables()}
        return subprocess.run(options.command, env={**os.environ, **variables}, check=False).returncode
    finally:
        server.stop()
        cleaner.communicate(timeout=_END_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
