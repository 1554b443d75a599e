"""The task runners of Dask and Ray, which give a freed worker the next task of a cancelled flow run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelling

from dstack_core import Run
from dstack_core.local import LocalServer

from .hosts import module
from .support import (
    all_runs,
    artifacts_of,
    event_names,
    log_records,
    outcome_of,
    state_of,
    until,
)

pytestmark = [
    pytest.mark.runners,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("prefect_server"),
]

# A limit for a busy machine.
START_SECONDS = 240.0
GRACE = 8.0


@pytest.fixture(scope="module")
def served(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("runners") / "log"
    with LocalServer(step_seconds=0.02, stop_grace_seconds=GRACE) as server:
        environment = {
            **os.environ,
            "DSTACK_SERVER_URL": server.url,
            "DSTACK_PROJECT": server.project,
            "DSTACK_TOKEN": server.token,
            # Ray unpickles flows, for which it imports their module by the name that serve() gives it.
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with module("tests.provider_prefect.runner_flows", log=log, environment=environment) as process:
            until(lambda: process.poll() is not None or deployed(), seconds=START_SECONDS)
            assert process.poll() is None, log.read_text()[-3000:]
            yield server


def deployed() -> bool:
    with get_client(sync_client=True) as client:
        return {"dask_sweep", "ray_sweep"} <= {made.name for made in client.read_deployments()}


def runs_of(server: LocalServer, flow_run_id: UUID) -> list[Run]:
    return [run for run in all_runs(server) if f"/{flow_run_id}/" in (run.marker or "")]


def start(name: str, server: LocalServer) -> UUID:
    """Start a flow run and wait until its first run is running.

    Ray must start within 30 s, which a busy machine misses: then the flow run crashes and another one starts.
    """

    def is_running(flow_run_id: UUID) -> bool:
        return any(run.raw_status == "running" for run in runs_of(server, flow_run_id))

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{name.replace('_', '-')}/{name}")
        for _ in range(3):
            flow_run_id = client.create_flow_run_from_deployment(deployment.id).id
            until(
                partial(lambda run_id: is_running(run_id) or state_of(run_id).is_crashed(), flow_run_id),
                seconds=START_SECONDS,
                what="the first run is running",
            )
            if is_running(flow_run_id):
                return flow_run_id
    raise AssertionError(f"{name}: the task runner did not start")


@pytest.mark.parametrize("name", ["dask_sweep", "ray_sweep"])
def test_a_cancelled_flow_run_submits_nothing_more_and_shows_the_end(name: str, served: LocalServer) -> None:
    flow_run_id = start(name, served)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelling())
    until(lambda: state_of(flow_run_id).is_cancelled(), seconds=90, what="the flow run is Cancelled")
    (run,) = runs_of(served, flow_run_id)
    assert outcome_of(run).reason == "stopped_by_user"
    log_records(flow_run_id, last="finished running successfully")
    until(lambda: "dstack.run.terminated" in event_names(run.id), seconds=30, what="the event of the end")
    assert event_names(run.id) == ["dstack.run.started", "dstack.run.stopping", "dstack.run.terminated"]
    found = artifacts_of(flow_run_id)
    assert found["dstack-train-progress"].data == 100.0
    assert "terminated" in found["dstack-train"].data
