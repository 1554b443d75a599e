"""What the tests of the worker share: work pools, worker processes, deployments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from prefect_dstack import DstackWorker

from .support import log_records

ROOT = Path(__file__).parents[2]
ENTRYPOINT = "tests/provider_prefect/machine_flows.py:speaking"
EXECUTE = f"{sys.executable} -m prefect flow-run execute"
# A limit for a busy machine; each wait ends as soon as its condition holds.
START_SECONDS = 300.0


class Server(Protocol):
    """A dstack server, embedded or real."""

    @property
    def url(self) -> str:
        """Return its address."""

    @property
    def token(self) -> str:
        """Return a user's token."""

    @property
    def project(self) -> str:
        """Return its project."""


@contextmanager
def worker(
    server: Server | None,
    pool: str,
    log: Path,
    name: str | None = None,
    *,
    limit: int | None = None,
    api: str | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker process of the pool that is ended with the test; its name is the pool's by default.

    ``limit`` is how many flow runs it may have at once, ``api`` the address of another Prefect server.
    """
    given = {} if server is None else {"URL": server.url, "PROJECT": server.project, "TOKEN": server.token}
    environment = {
        **os.environ,
        **{f"DSTACK_{'SERVER_' if name == 'URL' else ''}{name}": value for name, value in given.items()},
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_SECRET": "of-the-worker-alone",
    }
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
    command += ["--type", "dstack", "--name", name or pool]
    command += [] if limit is None else ["--limit", str(limit)]
    environment |= {} if api is None else {"PREFECT_API_URL": api}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def new_pool(name: str | None = None) -> str:
    """Create a work pool, with a new name by default, and return its name."""
    name = name or f"pool-{uuid4().hex[:8]}"
    template = DstackWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="dstack", base_job_template=template))
    return name


def deploy(pool: str, **variables: Any) -> UUID:
    """Deploy the flow to the pool; return the deployment's id."""
    loaded: Any = flow.from_source(source=str(ROOT), entrypoint=ENTRYPOINT)
    variables = {"command": EXECUTE, "poll_interval": 0.5, **variables}
    made = loaded.deploy(
        name=pool,
        work_pool_name=pool,
        job_variables=variables,
        build=False,
        push=False,
        print_next_steps=False,
    )
    return UUID(str(made))


def start(deployment_id: UUID, **parameters: Any) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.create_flow_run_from_deployment(deployment_id, parameters=parameters)


def read(flow_run: FlowRun) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.id)


def cancel(flow_run: FlowRun) -> float:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Cancelling())
    return time.monotonic()


def the_line(flow_run: FlowRun, line: str, last: str) -> int:
    """Return how often a line is in the flow run's log, once that contains ``last``."""
    messages = log_records(flow_run.id, last=last, seconds=START_SECONDS)
    return sum(message.split("\n").count(line) for message in messages)
