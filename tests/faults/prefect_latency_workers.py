"""The ways to end a flow run for which a worker started a machine."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect_dstack import DstackWorker
from tests.faults.latency import LatencyCase, Way
from tests.faults.latency_judge import Seen
from tests.faults.prefect_latency_host import OVER_SECONDS, START_SECONDS, LatencyHost, watch
from tests.provider_prefect import hosts
from tests.provider_prefect.support import until

# No host ends a worker that stops a machine, so this is our own limit (seconds).
_LIMIT = 90.0
# No machine has so many GPUs, and the search takes longer than any case.
_SOUGHT = {"resources": {"gpu": "1000"}, "retry": {"on_events": ["no-capacity"], "duration": "1h"}}
# A machine in which the flow's process hangs.
_HUNG = {"command": "trap '' INT TERM; echo started; sleep 9000"}
# After this time (seconds) Prefect lets a worker stop what is still being cancelled, by ``kill_infrastructure``.
_TEARDOWN_SECONDS = 45
SERVER_SETTINGS = {
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": str(_TEARDOWN_SECONDS)
}
_WORKER_SETTINGS = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_WORKER_HEARTBEAT_SECONDS": "2"}
_POOL = "latency"


def _start(host: LatencyHost, case: LatencyCase, **variables: Any) -> UUID:
    with host.lock:
        if _POOL not in host.deployments:
            host.deployments[_POOL] = _work(host)
    credentials = {
        "server_url": case.url,
        "project_name": host.server.project,
        "user_token": host.server.token,
    }
    chosen = {"command": "sleep 9000", "poll_interval": 0.5, "credentials": credentials, **variables}
    return host.api.start(host.deployments[_POOL], {}, name=case.name, job_variables=chosen)


def _work(host: LatencyHost) -> UUID:
    """Start a worker, and return the deployment of its work pool."""
    template = DstackWorker.get_default_base_job_template()
    arguments = ("worker", "start", "--pool", _POOL, "--type", "dstack", "--name", _POOL)
    environment = host.environment | _WORKER_SETTINGS
    deployment = host.api.new_work_pool(_POOL, "dstack", template)
    log = host.folder / "worker.log"
    host.processes.enter_context(hosts.module("prefect", *arguments, log=log, environment=environment))
    return deployment


def sought(host: LatencyHost) -> Way:
    """Return the way that cancels a flow run while dstack searches for a machine."""

    def way(case: LatencyCase) -> Seen:
        flow_run_id = _start(host, case, **_SOUGHT)
        name = until(
            lambda: _run_name(host, flow_run_id), seconds=START_SECONDS, pause=0.5, what="the machine's run"
        )
        run = case.client.runs.get(name)
        assert run is not None
        case.begin()
        case.caused()
        host.api.set_state(flow_run_id, "CANCELLING")
        watch(case, [run], _LIMIT)
        if case.stopped_after is not None:
            host.wait_for_report(run)
        return host.over(case, flow_run_id, [run], ["CANCELLED"], has_artifacts=False)

    return way


def torn_down(host: LatencyHost) -> Way:
    """Return the way in which Prefect lets the worker stop a machine on which the flow's process hangs."""

    def way(case: LatencyCase) -> Seen:
        flow_run_id = _start(host, case, **_HUNG)
        runs = host.wait_for_runs(case, flow_run_id, has_artifacts=False)
        # The flow's process would have done this.
        host.api.set_state(flow_run_id, "RUNNING", force=True)
        case.begin()
        host.api.set_state(flow_run_id, "CANCELLING")
        until(
            lambda: host.api.state(flow_run_id) == "CANCELLED",
            seconds=_TEARDOWN_SECONDS + OVER_SECONDS,
            pause=0.5,
            what="Prefect's own Cancelled",
        )
        case.caused()
        watch(case, runs, _LIMIT)
        if case.stopped_after is not None:
            host.wait_for_report(runs[0])
        return host.over(case, flow_run_id, runs, ["CANCELLED"], has_artifacts=False)

    return way


def _run_name(host: LatencyHost, flow_run_id: UUID) -> str:
    project_and_name: str = host.api.flow_run(flow_run_id)["infrastructure_pid"] or ""
    return project_and_name.rpartition(":")[2]


def ways(host: LatencyHost) -> dict[str, Way]:
    """Return the ways of a worker by their names in the table."""
    return {"worker, machine not found yet": sought(host), "worker, kill_infrastructure": torn_down(host)}
