"""Flow runs of a process worker, cancelled through the REST API or killed: what the dstack server saw."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Cancelling

from dstack_core.local import LocalServer

from .hosts import module
from .support import all_runs, artifacts_of, event_names, log_records, outcome_of, state_of, stops, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.matrix,
    pytest.mark.usefixtures("prefect_server"),
]

ROOT = Path(__file__).parents[2]
# A limit for a busy machine; each wait ends as soon as its condition holds.
START_SECONDS = 300.0


@pytest.fixture(scope="module")
def pool(
    prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LocalServer, Path]]:
    """Run a process worker; return its pool, the dstack server of its flows, and the folder of their ids."""
    with process_pool(tmp_path_factory.mktemp("process")) as running:
        yield running


@contextmanager
def process_pool(directory: Path, **options: Any) -> Iterator[tuple[str, LocalServer, Path]]:
    """Run a process worker whose flows use a dstack server with these options."""
    name = f"process-{uuid4().hex[:8]}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    with LocalServer(step_seconds=0.02, **options) as server:
        environment = {
            **os.environ,
            "DSTACK_SERVER_URL": server.url,
            "DSTACK_PROJECT": server.project,
            "DSTACK_TOKEN": server.token,
            "TEST_PIDS": str(directory),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        command = ("worker", "start", "--pool", name, "--type", "process")
        with module("prefect", *command, log=directory / "log", environment=environment):
            yield name, server, directory


def start(pool: str, name: str) -> UUID:
    entrypoint = f"tests/provider_prefect/served_flows.py:{name}"
    loaded: Any = flow.from_source(source=str(ROOT), entrypoint=entrypoint)
    made = loaded.deploy(name=pool, work_pool_name=pool, build=False, push=False, print_next_steps=False)
    with get_client(sync_client=True) as client:
        return client.create_flow_run_from_deployment(UUID(str(made))).id


def running(server: LocalServer, before: int, count: int) -> bool:
    mine = all_runs(server)[before:]
    return len(mine) == count and all(run.raw_status == "running" for run in mine)


@pytest.mark.parametrize(("name", "count"), [("direct", 1), ("adirect", 1), ("mapped", 3), ("parent", 1)])
def test_a_cancelled_flow_run_stops_its_runs_once(
    name: str, count: int, pool: tuple[str, LocalServer, Path]
) -> None:
    work_pool, server, _ = pool
    before, stopped_before = len(all_runs(server)), stops(server)
    flow_run_id = start(work_pool, name)
    until(lambda: running(server, before, count), seconds=START_SECONDS)
    reply = httpx.post(
        f"{os.environ['PREFECT_API_URL']}/flow_runs/{flow_run_id}/set_state",
        json={"state": {"type": "CANCELLING", "name": "Cancelling"}},
    )
    cancelled = time.monotonic()
    assert reply.json()["status"] == "ACCEPT"
    until(lambda: all(run.outcome() for run in all_runs(server)[before:]), seconds=30)
    seconds = time.monotonic() - cancelled
    print(f"{name}: stopped {seconds:.1f} s after the cancellation")  # noqa: T201
    assert seconds < 10
    until(lambda: state_of(flow_run_id).is_cancelled(), seconds=60)
    mine = all_runs(server)[before:]
    assert [outcome_of(run).reason for run in mine] == ["stopped_by_user"] * count
    assert stops(server) - stopped_before == count


def test_a_killed_flow_leaves_nothing_running(pool: tuple[str, LocalServer, Path]) -> None:
    work_pool, server, directory = pool
    before = len(all_runs(server))
    flow_run_id = start(work_pool, "hooked")
    until(lambda: running(server, before, 1), seconds=START_SECONDS)
    os.kill(int((directory / str(flow_run_id)).read_text()), signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: all_runs(server)[before].outcome(), seconds=60)
    seconds = time.monotonic() - killed
    print(f"hooked: stopped {seconds:.1f} s after SIGKILL")  # noqa: T201
    assert outcome_of(all_runs(server)[before]).reason == "stopped_by_user"
    until(lambda: state_of(flow_run_id).is_crashed(), seconds=60)


def test_an_end_that_comes_after_its_task_is_reported_by_the_hook(tmp_path: Path) -> None:
    with process_pool(tmp_path, stop_grace_seconds=40.0) as (work_pool, server, _):
        flow_run_id = start(work_pool, "stubborn")
        until(lambda: running(server, 0, 1), seconds=START_SECONDS)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_id, Cancelling())
        until(lambda: state_of(flow_run_id).is_cancelled(), seconds=120)
        (run,) = all_runs(server)
        assert outcome_of(run).reason == "stopped_by_user"
        messages = log_records(flow_run_id, last="Reported the end")
    assert any(f"Stopping run {run.name} (" in message for message in messages)
    until(lambda: "dstack.run.terminated" in event_names(run.id), seconds=30)
    assert event_names(run.id) == ["dstack.run.started", "dstack.run.stopping", "dstack.run.terminated"]
    found = artifacts_of(flow_run_id)
    assert found["dstack-train-progress"].data == 100.0
    assert "terminated" in found["dstack-train"].data
    assert stops(server) == 1
