"""What ``prefect-dstack doctor`` checks of Prefect: whether nothing can be left running.

The problem: a task stops its run itself. For a process that was killed, a hook of its flow does, which a
worker or ``serve()`` calls; for what is left then, the reaper. A flow run that is never ended stays Running,
and its runs with it. Each of these needs something of Prefect that no task can see.

The idea: questions to Prefect's public API, one finding for each. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from httpx import HTTPError
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import TaskRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from dstack_core.integration import Finding
from prefect_dstack.credentials import DstackCredentials
from prefect_dstack.worker import DstackWorker

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool

# A pass is made every quarter of an hour or so; a day without one means that its schedule does not work.
_OLDEST_PASS = timedelta(days=1)
# Prefect's server ends a flow run that is Cancelling for five minutes; hooks have run by then or will not.
_LONGEST_CANCELLING = timedelta(minutes=10)
_HEARTBEAT = "prefect.flow-run.heartbeat"
# Of the flow runs that are Cancelling; more are as bad.
_MOST_FLOW_RUNS = 50
_REAPER_ADVICE = (
    "Deploy a flow that calls reap_runs() every 15 minutes, or let cron run this: prefect-dstack reap"
)


def prefect_findings(block: str | None) -> Generator[Finding, None, bool]:
    """Yield what was found, a finding for each check; return whether Prefect's server answers.

    ``block`` is the name of the block that is examined, None for the environment.
    """
    url = PREFECT_API_URL.value()
    if not url:
        # Without it Prefect starts a server of its own, which knows no flow run.
        yield Finding(
            "Prefect",
            "warning",
            "PREFECT_API_URL: expected the address of your Prefect server, got none.",
            "Set it: prefect config set PREFECT_API_URL=http://HOST:4200/api",
        )
        return False
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        if problem is not None:
            yield Finding(
                "Prefect",
                "error",
                f"The Prefect server does not answer at {url} ({type(problem).__name__}).",
                "Start it (prefect server start), or correct PREFECT_API_URL.",
            )
            return False
        yield Finding("Prefect", "ok", f"The server answers at {url}.")
        try:
            yield from _block(client, block)
            for pool in client.read_work_pools():
                if pool.type == DstackWorker.type:
                    yield from _pool(client, pool)
            yield from _reaper(client)
            yield from _cancelling(client)
            yield from _zombies(client)
        except HTTPError as error:
            yield Finding(
                "Prefect",
                "warning",
                f"The server refused a request ({type(error).__name__}), so not everything was checked.",
                "Check the rights of PREFECT_API_KEY, and the server's own log.",
            )
    return True


def _block(client: SyncPrefectClient, block: str | None) -> Iterator[Finding]:
    try:
        slug = str(DstackCredentials.get_block_type_slug())
        saved = client.read_block_documents_by_type(slug)
    except ObjectNotFound:
        saved = []
    names = sorted(str(each.name) for each in saved if each.name)
    if block is not None:
        # A missing one is the finding of the configuration.
        return
    if names:
        yield Finding("Prefect block", "ok", f"Saved: {', '.join(names)}. Examined: this environment.")
    else:
        yield Finding(
            "Prefect block",
            "warning",
            "No DstackCredentials block is saved: each process needs the server and the token itself.",
            "Run: prefect block register -m prefect_dstack, and save a block in Prefect's UI.",
        )


def _pool(client: SyncPrefectClient, pool: WorkPool) -> Iterator[Finding]:
    if pool.is_paused:
        yield Finding(
            "Prefect work pool",
            "warning",
            f"{pool.name} is paused; its flow runs wait.",
            f"Run: prefect work-pool resume {pool.name}",
        )
        return
    workers = client.read_workers_for_work_pool(pool.name)
    online = [each.name for each in workers if str(getattr(each.status, "value", each.status)) == "ONLINE"]
    if online:
        yield Finding("Prefect work pool", "ok", f"{pool.name} has {_number(len(online), 'worker')}.")
    else:
        yield Finding(
            "Prefect work pool",
            "warning",
            f"{pool.name} has no worker; its flow runs wait, and machines that outlast them are not stopped.",
            f"Start one: prefect worker start --pool {pool.name}",
        )


def _reaper(client: SyncPrefectClient) -> Iterator[Finding]:
    """Find the newest pass of the reaper, and whether its deployment makes more.

    A deployment's flow is code, so only a pass that was made shows that it calls the reaper.
    """
    passes = [
        each
        for name in ("reap_runs", "areap_runs")
        for each in client.read_task_runs(
            task_run_filter=TaskRunFilter(name=TaskRunFilterName(like_=f"{name}-")),
            sort=TaskRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    ]
    if not passes:
        yield Finding(
            "Prefect reaper",
            "warning",
            "No flow has called it: runs that no process is left to stop keep running.",
            _REAPER_ADVICE,
        )
        return
    newest = max(passes, key=lambda each: each.expected_start_time or datetime.min.replace(tzinfo=UTC))
    flow_run = None if newest.flow_run_id is None else client.read_flow_run(newest.flow_run_id)
    deployment = (
        None
        if flow_run is None or flow_run.deployment_id is None
        else client.read_deployment(flow_run.deployment_id)
    )
    if deployment is not None and (
        deployment.paused or not any(each.active for each in deployment.schedules or ())
    ):
        yield Finding(
            "Prefect reaper",
            "warning",
            f"Its deployment {deployment.name} is paused or has no active schedule.",
            "Resume it, or set a schedule: prefect deployment schedule ls FLOW/DEPLOYMENT",
        )
    elif newest.state_type in (StateType.FAILED, StateType.CRASHED):
        yield Finding(
            "Prefect reaper",
            "warning",
            f"Its last pass ended as {newest.state_name}.",
            "Read the log of that task run: it names the runs that could not be stopped.",
        )
    elif newest.expected_start_time and datetime.now(UTC) - newest.expected_start_time > _OLDEST_PASS:
        yield Finding(
            "Prefect reaper",
            "warning",
            f"Its last pass was on {newest.expected_start_time:%Y-%m-%d}.",
            _REAPER_ADVICE,
        )
    else:
        how = f"deployment {deployment.name}" if deployment is not None else "a flow without a deployment"
        yield Finding("Prefect reaper", "ok", f"It runs in {how}.")


def _cancelling(client: SyncPrefectClient) -> Iterator[Finding]:
    """Find flow runs whose cancellation no worker and no ``serve()`` carries out, so that no hook runs."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING]))
    flow_runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state), limit=_MOST_FLOW_RUNS)
    oldest = datetime.now(UTC) - _LONGEST_CANCELLING
    stuck = [each for each in flow_runs if each.state is not None and each.state.timestamp < oldest]
    if stuck:
        yield Finding(
            "Prefect hooks",
            "warning",
            f"{_number(len(stuck), 'flow run')} such as {stuck[0].name} stay Cancelling: no worker and no "
            "serve() ends them and calls their hooks.",
            "Start the worker or the serve() they belong to, or set them to Cancelled; the reaper then stops "
            "their runs.",
        )
    else:
        yield Finding("Prefect hooks", "ok", "No flow run waits for its cancellation.")


def _zombies(client: SyncPrefectClient) -> Iterator[Finding]:
    """Find the automation that ends flow runs whose process was killed. Source: "Detect zombie flows"."""
    automations = client.read_automations()
    watching = [each for each in automations if each.enabled and _HEARTBEAT in each.model_dump_json()]
    if watching:
        yield Finding("Prefect automation", "ok", f"{watching[0].name} ends flow runs without a heartbeat.")
        return
    yield Finding(
        "Prefect automation",
        "warning",
        "No automation watches heartbeats: the flow run of a killed script, and its run, keep running.",
        "Create Prefect's automation Crash zombie flows: "
        "https://docs.prefect.io/v3/advanced/detect-zombie-flows",
    )


def _number(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
