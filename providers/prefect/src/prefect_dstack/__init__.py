"""Run GPU work on dstack from Prefect flows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect_dstack.credentials import DstackCredentials
from prefect_dstack.deploy import adeploy_service, deploy_service
from prefect_dstack.functions import dstack_task
from prefect_dstack.hooks import stop_dstack_runs, stop_runs_on_cancellation, stop_runs_on_crash
from prefect_dstack.job_block import DstackRun
from prefect_dstack.reaper import areap_runs, reap_runs
from prefect_dstack.retry_conditions import retry_on
from prefect_dstack.run_handle import DstackRunHandle
from prefect_dstack.runs import (
    aget_run,
    astop_run,
    await_for_run,
    await_for_service,
    get_run,
    stop_run,
    wait_for_run,
    wait_for_service,
)
from prefect_dstack.tasks import arun_task, asubmit_run, run_task, submit_run

if TYPE_CHECKING:
    from prefect_dstack.cache import RUN_INPUTS, RunInputs
    from prefect_dstack.decorators import DstackFlow, MachineOptions, dstack
    from prefect_dstack.fleets import acreate_fleet, adelete_fleet, create_fleet, delete_fleet, dstack_fleet
    from prefect_dstack.flow_future import DstackFlowRunFuture
    from prefect_dstack.flows import arun_and_report, run_and_report
    from prefect_dstack.offers import await_for_offer, wait_for_offer
    from prefect_dstack.project_secrets import sync_secrets
    from prefect_dstack.run_dict import RunDict
    from prefect_dstack.volumes import acreate_volume, adelete_volume, create_volume, delete_volume
    from prefect_dstack.worker import DstackWorker

__version__ = "0.1.0"

__all__ = [
    "RUN_INPUTS",
    "DstackCredentials",
    "DstackFlow",
    "DstackFlowRunFuture",
    "DstackRun",
    "DstackRunHandle",
    "DstackWorker",
    "MachineOptions",
    "RunDict",
    "RunInputs",
    "__version__",
    "acreate_fleet",
    "acreate_volume",
    "adelete_fleet",
    "adelete_volume",
    "adeploy_service",
    "aget_run",
    "areap_runs",
    "arun_and_report",
    "arun_task",
    "astop_run",
    "asubmit_run",
    "await_for_offer",
    "await_for_run",
    "await_for_service",
    "create_fleet",
    "create_volume",
    "delete_fleet",
    "delete_volume",
    "deploy_service",
    "dstack",
    "dstack_fleet",
    "dstack_task",
    "get_run",
    "reap_runs",
    "retry_on",
    "run_and_report",
    "run_task",
    "stop_dstack_runs",
    "stop_run",
    "stop_runs_on_cancellation",
    "stop_runs_on_crash",
    "submit_run",
    "sync_secrets",
    "wait_for_offer",
    "wait_for_run",
    "wait_for_service",
]


_VOLUMES = ("acreate_volume", "adelete_volume", "create_volume", "delete_volume")
_FLEETS = ("acreate_fleet", "adelete_fleet", "create_fleet", "delete_fleet", "dstack_fleet")


def __getattr__(name: str) -> Any:
    """Load what most flows do not need when it is first used."""
    value: Any
    if name == "DstackWorker":
        from prefect_dstack import worker

        value = worker.DstackWorker
    elif name in ("DstackFlow", "DstackFlowRunFuture", "MachineOptions", "dstack"):
        from prefect_dstack import decorators

        value = getattr(decorators, name)
    elif name in _FLEETS:
        from prefect_dstack import fleets

        value = getattr(fleets, name)
    elif name in _VOLUMES:
        from prefect_dstack import volumes

        value = getattr(volumes, name)
    elif name in ("await_for_offer", "wait_for_offer"):
        from prefect_dstack import offers

        value = getattr(offers, name)
    elif name == "sync_secrets":
        from prefect_dstack import project_secrets

        value = project_secrets.sync_secrets
    elif name == "RunDict":
        from prefect_dstack import run_dict

        value = run_dict.RunDict
    elif name in ("RUN_INPUTS", "RunInputs"):
        from prefect_dstack import cache

        value = getattr(cache, name)
    elif name in ("arun_and_report", "run_and_report"):
        from prefect_dstack import flows

        value = flows.run_and_report if name == "run_and_report" else flows.arun_and_report
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
