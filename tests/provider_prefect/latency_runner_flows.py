"""The flows of ``latency_flows`` with the task runners of Dask and Ray: more tasks than there are workers."""

from __future__ import annotations

from typing import Any

from prefect import flow, serve
from prefect_dask import DaskTaskRunner  # type: ignore[import-not-found]  # its environment is of its own
from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]

from prefect_dstack import run_task
from tests.provider_prefect.latency_flows import (
    AT_ONCE,
    OPTIONS,
    STUBBORN,
    credentials,
    leave_process_id,
    stop_on_own_server,
)

# Dask kills its workers 4 s after a cancellation, whatever they do; then only the hook is left.
_HOOKS: Any = [stop_on_own_server]
# A worker that a cancellation frees must not submit the run of the next task.
_QUEUED = 3
_DASK = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
_RAY = {"num_cpus": 1, "include_dashboard": False}


def _sweep(url: str, project: str) -> None:
    leave_process_id()
    block = credentials(url, project)
    for future in [run_task.submit(STUBBORN, block, **OPTIONS) for _ in range(_QUEUED)]:
        future.wait()


@flow(task_runner=DaskTaskRunner(cluster_kwargs=_DASK), on_cancellation=_HOOKS)
def dask_sweep(url: str, project: str) -> None:
    """Submit tasks to one Dask worker with one thread."""
    _sweep(url, project)


@flow(task_runner=RayTaskRunner(init_kwargs=_RAY), on_cancellation=_HOOKS)
def ray_sweep(url: str, project: str) -> None:
    """Submit tasks to one Ray worker."""
    _sweep(url, project)


FLOWS: dict[str, Any] = {"dask_sweep": dask_sweep, "ray_sweep": ray_sweep}


if __name__ == "__main__":
    serve(*(item.to_deployment(name) for name, item in FLOWS.items()), limit=AT_ONCE)
