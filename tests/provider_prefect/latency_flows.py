"""Flows whose runs are stopped on a slow or forgetful dstack server.

``python -m tests.provider_prefect.latency_flows serve`` serves them all; ``... NAME URL PROJECT`` runs one, as a
plain script does. The token of the dstack server comes from the environment: every user of the UI can read
the parameters of a flow run.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, serve, unmapped
from prefect.runtime import flow_run
from pydantic import SecretStr

from prefect_dstack import DstackCredentials, arun_task, run_task, stop_dstack_runs

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun

# It ignores a stop until the server's grace period ends: a real server needs seconds to end a run, too.
STUBBORN = {"type": "task", "commands": ["trap '' INT TERM; echo started; sleep 9000"]}
OPTIONS: dict[str, Any] = {"poll_interval": 0.5}
# Long enough for the run to be running on a busy machine.
TIMEOUT_SECONDS = 30
MAPPED = 3
AT_ONCE = 30


def credentials(url: str, project: str) -> DstackCredentials:
    """Return the credentials of the case's dstack server."""
    token = SecretStr(os.environ["DSTACK_TOKEN"])
    return DstackCredentials(server_url=url, project_name=project, user_token=token)


def leave_process_id() -> None:
    """Write this process's id where the test finds it."""
    folder = os.environ.get("TEST_PIDS")
    if folder:
        path = Path(folder) / str(flow_run.get_id())
        path.with_suffix(".new").write_text(str(os.getpid()))
        path.with_suffix(".new").rename(path)


@flow
def direct(url: str, project: str) -> None:
    """Call the sync task in the main thread."""
    leave_process_id()
    run_task(STUBBORN, credentials(url, project), **OPTIONS)


@flow
def submitted(url: str, project: str) -> None:
    """Submit the sync task to a thread."""
    leave_process_id()
    run_task.submit(STUBBORN, credentials(url, project), **OPTIONS).result()


@flow
def mapped(url: str, project: str) -> None:
    """Map the sync task over several configurations."""
    leave_process_id()
    run_task.map([STUBBORN] * MAPPED, unmapped(credentials(url, project)), **OPTIONS).result()


@flow
async def awaited(url: str, project: str) -> None:
    """Await the async task."""
    leave_process_id()
    await arun_task(STUBBORN, credentials(url, project), **OPTIONS)


@flow
def task_timeout(url: str, project: str) -> None:
    """Call the sync task with a time limit."""
    leave_process_id()
    run_task.with_options(timeout_seconds=TIMEOUT_SECONDS)(STUBBORN, credentials(url, project), **OPTIONS)


@flow
def submitted_task_timeout(url: str, project: str) -> None:
    """Submit the sync task with a time limit."""
    leave_process_id()
    limited = run_task.with_options(timeout_seconds=TIMEOUT_SECONDS)
    limited.submit(STUBBORN, credentials(url, project), **OPTIONS).result()


@flow
async def awaited_task_timeout(url: str, project: str) -> None:
    """Await the async task with a time limit."""
    leave_process_id()
    limited = arun_task.with_options(timeout_seconds=TIMEOUT_SECONDS)
    await limited(STUBBORN, credentials(url, project), **OPTIONS)


@flow(timeout_seconds=TIMEOUT_SECONDS)
def flow_timeout(url: str, project: str) -> None:
    """Call the sync task in a flow with a time limit."""
    leave_process_id()
    run_task(STUBBORN, credentials(url, project), **OPTIONS)


@flow(timeout_seconds=TIMEOUT_SECONDS)
async def awaited_flow_timeout(url: str, project: str) -> None:
    """Await the async task in a flow with a time limit."""
    leave_process_id()
    await arun_task(STUBBORN, credentials(url, project), **OPTIONS)


def stop_on_own_server(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Run the shipped hook with the server that the flow run's parameters name."""
    chosen = credentials(flow_run.parameters["url"], flow_run.parameters["project"])
    stop_dstack_runs(chosen)(flow, flow_run, state)


@flow(on_crashed=[stop_on_own_server])
def hooked(url: str, project: str) -> None:
    """Submit the sync task in a process that is killed."""
    leave_process_id()
    run_task.submit(STUBBORN, credentials(url, project), **OPTIONS).result()


FLOWS: dict[str, Any] = {
    "direct": direct,
    "submitted": submitted,
    "mapped": mapped,
    "awaited": awaited,
    "task_timeout": task_timeout,
    "submitted_task_timeout": submitted_task_timeout,
    "awaited_task_timeout": awaited_task_timeout,
    "flow_timeout": flow_timeout,
    "awaited_flow_timeout": awaited_flow_timeout,
    "hooked": hooked,
}


def main() -> None:
    """Serve all flows, or run one."""
    if sys.argv[1] == "serve":
        serve(*(item.to_deployment(name) for name, item in FLOWS.items()), limit=AT_ONCE)
        return
    # A shell that started the tests in the background may have left SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name, url, project = sys.argv[1:]
    chosen = FLOWS[name]
    if asyncio.iscoroutinefunction(chosen.fn):
        asyncio.run(chosen(url, project))
    else:
        chosen(url, project)


if __name__ == "__main__":
    main()
