"""Start a real server by hand: `python -m tests.rig`, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from tests.rig.server import DEFAULT_VERSION, RealServer


def main() -> None:
    """Start the server, print what a client needs and wait for an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m tests.rig", description=__doc__)
    parser.add_argument("--version", default=DEFAULT_VERSION, help="the server to start")
    parser.add_argument("--python", type=Path, help="the Python of the environment that holds the server")
    parser.add_argument("--stock", action="store_true", help="keep the pauses of the server as they are")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=16, help="jobs per host")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs each host claims to have")
    options = parser.parse_args()
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    with RealServer(
        options.version,
        options.python,
        fast=not options.stock,
        hosts=options.hosts,
        blocks=options.blocks,
        gpus=options.gpus,
    ) as server:
        sys.stdout.write(
            f"url      {server.url}\ntoken    {server.token}\nproject  {server.project}\nfleet    {server.fleet}\n"
            f"log      {server.log_path}\nCtrl-C ends it.\n"
        )
        sys.stdout.flush()
        interrupted.wait()


if __name__ == "__main__":
    main()
