"""Flows that another process serves, to be cancelled from outside: ``python -m benchmarks.served``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from prefect import flow, serve
from prefect.runtime import flow_run

from prefect_dstack import run_task


@flow
def signalled() -> None:
    """Wait, and write down the time at which Prefect ends the flow."""
    try:
        time.sleep(300)
    finally:
        (Path(os.environ["BENCH_FOLDER"]) / str(flow_run.get_id())).write_text(str(time.monotonic()))


@flow
def running() -> None:
    """Wait for a run."""
    run_task({"type": "task", "commands": ["sleep 300"]}, poll_interval=1.0)


def main() -> None:
    """Serve until ended."""
    flows: list[Any] = [signalled, running]
    serve(*(item.to_deployment(item.name) for item in flows), limit=4)


if __name__ == "__main__":
    main()
