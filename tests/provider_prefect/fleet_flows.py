"""A flow with a fleet of its own, whose process is killed: ``python -m tests.provider_prefect.fleet_flows``.

With the argument ``serve`` the flow is served, so that Prefect calls its hooks; with another one it runs as a script.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, serve
from prefect.runtime import flow_run

from prefect_dstack import dstack_fleet, run_task, stop_dstack_runs

# The variable with the folder in which each process writes its id, in a file named after its trial.
FOLDER = "FLEET_FLOWS"
AT_ONCE = 10
# 6 s with lines.
_LINES = "for i in $(seq 30); do echo line-$i; sleep 0.2; done"
_STOP = stop_dstack_runs()


@flow(name="fleet-killed", on_cancellation=[_STOP], on_crashed=[_STOP])
def fleet_killed(trial: str, then: str = "true") -> None:
    """Run a task on a fleet; ``then`` is its last command."""
    folder = Path(os.environ[FOLDER])
    (folder / f"{trial}.part").write_text(f"{os.getpid()} {flow_run.get_id()}")
    (folder / f"{trial}.part").rename(folder / trial)
    with dstack_fleet({"nodes": "0..1"}):
        run_task({"type": "task", "commands": [_LINES, then]}, poll_interval=0.5)


def main() -> None:
    """Serve the flow, or run it."""
    if sys.argv[1] == "serve":
        deployment: Any = fleet_killed.to_deployment("fleet-killed")
        serve(deployment, limit=AT_ONCE)
    else:
        # A run that would outlive all trials.
        fleet_killed(sys.argv[1], "sleep 3600")


if __name__ == "__main__":
    main()
