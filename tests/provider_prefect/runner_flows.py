"""Flows with the task runners of Dask and Ray: ``python -m tests.provider_prefect.runner_flows``."""

from __future__ import annotations

import signal
from typing import Any

from prefect import flow, serve
from prefect_dask import DaskTaskRunner  # type: ignore[import-not-found]  # its environment is of its own
from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]

from prefect_dstack import run_task, stop_runs_on_cancellation

# It ignores the signals of a stop, so that its end takes the server's whole grace period.
STUBBORN = {"type": "task", "name": "train", "commands": ["trap '' INT TERM; echo started; sleep 600"]}
QUEUED = 4


def sweep() -> None:
    """Submit more tasks than there are workers."""
    for future in [run_task.submit(STUBBORN, poll_interval=0.5) for _ in range(QUEUED)]:
        future.wait()


@flow(
    task_runner=DaskTaskRunner(
        cluster_kwargs={"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    ),
    on_cancellation=[stop_runs_on_cancellation],
)
def dask_sweep() -> None:
    """Use one Dask worker with one thread."""
    sweep()


@flow(
    task_runner=RayTaskRunner(init_kwargs={"num_cpus": 1, "include_dashboard": False}),
    on_cancellation=[stop_runs_on_cancellation],
)
def ray_sweep() -> None:
    """Use one Ray worker."""
    sweep()


FLOWS: list[Any] = [dask_sweep, ray_sweep]


def main() -> None:
    """Serve the flows."""
    # A shell that started the tests in the background may have left SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(*(item.to_deployment(item.__name__) for item in FLOWS), limit=2)


if __name__ == "__main__":
    main()
