"""Flows with the task runners of Dask and Ray: ``python -m tests.provider_prefect.runner_flows``."""

from __future__ import annotations

import signal
from typing import Any

from prefect import flow, serve, unmapped
from prefect_dask import DaskTaskRunner  # type: ignore[import-not-found]  # its environment is of its own
from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]
from prefect_ray.context import remote_options  # type: ignore[import-not-found]

from prefect_dstack import run_task, stop_runs_on_cancellation
from tests.callback_journal import Journal

# It ignores the signals of a stop, so that its end takes the server's whole grace period.
STUBBORN = {"type": "task", "name": "train", "commands": ["trap '' INT TERM; echo started; sleep 600"]}
QUEUED = 4
WORKERS = 4
LINES = 20


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


def lines(number: int) -> list[str]:
    """Return the lines that the run of that number prints."""
    return [*(f"part {number} line {line}" for line in range(1, LINES + 1)), f"part {number} after"]


def mapped(count: int, file: str) -> list[str]:
    """Map runs, each of which prints lines and ends once the file exists."""
    tasks = [
        {
            "type": "task",
            "name": f"part-{number}",
            "commands": [
                f"seq -f 'part {number} line %g' 1 {LINES}",
                f"while [ ! -e {file} ]; do sleep 0.1; done",
                f"echo part {number} after",
            ],
        }
        for number in range(count)
    ]
    futures = run_task.map(tasks, poll_interval=0.5, callbacks=unmapped(Journal))
    return [future.result()["status"] for future in futures]


_DASK = {"threads_per_worker": 1, "dashboard_address": None}
_RAY = {"num_cpus": WORKERS, "include_dashboard": False}


@flow(
    task_runner=DaskTaskRunner(cluster_kwargs={**_DASK, "n_workers": WORKERS}),
    on_cancellation=[stop_runs_on_cancellation],
)
def dask_map(count: int, file: str) -> list[str]:
    """Use four Dask workers."""
    return mapped(count, file)


@flow(task_runner=RayTaskRunner(init_kwargs=_RAY), on_cancellation=[stop_runs_on_cancellation])
def ray_map(count: int, file: str) -> list[str]:
    """Use four Ray workers."""
    return mapped(count, file)


@flow(
    task_runner=DaskTaskRunner(
        cluster_kwargs={**_DASK, "n_workers": 1, "scheduler_kwargs": {"allowed_failures": 0}}
    )
)
def dask_lost(count: int, file: str) -> list[str]:
    """Use a Dask worker whose tasks are not repeated when it is lost; there is no hook."""
    return mapped(count, file)


@flow(task_runner=RayTaskRunner(init_kwargs=_RAY))
def ray_lost(count: int, file: str) -> list[str]:
    """Use Ray workers whose tasks are not repeated when they are lost; there is no hook."""
    with remote_options(max_retries=0):
        return mapped(count, file)


FLOWS: list[Any] = [dask_sweep, ray_sweep, dask_map, ray_map, dask_lost, ray_lost]


def main() -> None:
    """Serve the flows."""
    # A shell that started the tests in the background may have left SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(*(item.to_deployment(item.__name__) for item in FLOWS), limit=2)


if __name__ == "__main__":
    main()
