"""Run GPU work on dstack from Prefect flows."""

from __future__ import annotations

from prefect_dstack.credentials import DstackCredentials
from prefect_dstack.hooks import stop_dstack_runs, stop_runs_on_cancellation, stop_runs_on_crash
from prefect_dstack.tasks import arun_task, run_task

__version__ = "0.1.0"

__all__ = [
    "DstackCredentials",
    "__version__",
    "arun_task",
    "run_task",
    "stop_dstack_runs",
    "stop_runs_on_cancellation",
    "stop_runs_on_crash",
]
