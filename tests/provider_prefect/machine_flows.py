"""Flows that a worker runs on machines."""

from __future__ import annotations

import os
import time
from pathlib import Path

from prefect import flow, get_run_logger


@flow
def speaking(until: str | None = None) -> str:
    """Write a line in each possible way; with ``until``, end once that file exists."""
    get_run_logger().info("by-the-logger")
    print("by-print-1", flush=True)  # noqa: T201
    while until and not Path(until).exists():
        time.sleep(0.1)
    print("by-print-2", flush=True)  # noqa: T201
    return os.environ.get("WORD", "")
