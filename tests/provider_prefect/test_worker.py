"""Flow runs on machines: a real worker process, a real Prefect server, an embedded dstack server."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Pending, Running

from dstack_core import Run
from dstack_core.integration import describe_outcome
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackWorker, _worker_runs
from prefect_dstack._names import flow_run_marker_prefix, worker_marker_prefix
from prefect_dstack._worker_runs import submit_once
from prefect_dstack._worker_variables import DstackJobConfiguration

from .machines import EXECUTE, START_SECONDS, cancel, deploy, new_pool, read, start, the_line, worker
from .support import (
    all_runs,
    event_names,
    events_of,
    is_running,
    log_records,
    outcome_of,
    state_of,
    submissions,
    the_run,
    until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.matrix,
    pytest.mark.usefixtures("prefect_server"),
]


@pytest.fixture
def pool() -> str:
    """Create a work pool for one test."""
    return new_pool()


def test_a_flow_run_runs_on_a_machine_and_each_line_is_logged_once(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    credentials.save("for-the-worker", overwrite=True)
    deployment = deploy(
        pool,
        credentials="for-the-worker",
        env={"WORD": "a-word"},
        resources={"gpu": "24GB.."},
        spot_policy="auto",
        max_duration="2h",
        configuration={"name": "ignored-by-the-worker", "working_dir": "."},
    )
    flow_run = start(deployment)
    with worker(None, pool, tmp_path / "log"):
        until(lambda: state_of(flow_run.id).is_final(), seconds=START_SECONDS)
        until(lambda: the_run(dstack).outcome(), seconds=30)
        lines = [
            the_line(flow_run, word, "by-print-2") for word in ("by-the-logger", "by-print-1", "by-print-2")
        ]
    assert state_of(flow_run.id).is_completed(), (tmp_path / "log").read_text()[-3000:]
    assert lines == [1, 1, 1]
    run = the_run(dstack)
    assert outcome_of(run).succeeded
    assert read(flow_run).infrastructure_pid == f"{dstack.project}:{run.name}"
    spec = sent(dstack, run)
    assert spec["max_duration"] == 7200
    assert spec["spot_policy"] == "auto"
    assert spec["resources"]["gpu"]["memory"]["min"] == 24
    assert spec["env"]["WORD"] == "a-word"
    assert not any(
        name.startswith(("PREFECT_SERVER", "PREFECT_HOME", "PREFECT_WORKER")) for name in spec["env"]
    )


def sent(server: LocalServer, run: Run) -> dict[str, Any]:
    reply = httpx.post(
        f"{server.url}/api/project/{server.project}/runs/get",
        headers={"Authorization": f"Bearer {server.token}"},
        json={"run_name": run.name},
    )
    configuration: dict[str, Any] = reply.json()["run_spec"]["configuration"]
    return configuration


def test_a_machine_that_fails_crashes_its_flow_run_with_its_last_lines(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    flow_run = start(deploy(pool, command="echo no-such-driver; exit 3"))
    with worker(dstack, pool, tmp_path / "log"):
        until(lambda: state_of(flow_run.id).is_final(), seconds=START_SECONDS)
        # The last record of the worker, which has the next step.
        messages = log_records(flow_run.id, last="(user.exit)", seconds=60)
    assert state_of(flow_run.id).is_crashed()
    assert "status code 3" in state_of(flow_run.id).message
    assert sum(message.count("no-such-driver") for message in messages) == 1
    outcome = outcome_of(the_run(dstack))
    assert messages.count(describe_outcome(outcome)) == 1
    ended = until(
        lambda: [one for one in events_of(the_run(dstack).id) if one["event"] == "dstack.run.failed"]
    )
    assert ended[0]["resource"]["dstack.category"] == outcome.category == "user.exit"


def test_a_machine_prints_no_more_into_the_log_than_its_budget(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    flow_run = start(deploy(pool, command=f"echo within-budget; {EXECUTE}", log_budget_bytes=16))
    with worker(dstack, pool, tmp_path / "log"):
        until(lambda: state_of(flow_run.id).is_final(), seconds=START_SECONDS)
        until(lambda: the_run(dstack).outcome(), seconds=30)
        run = the_run(dstack)
        # The worker logs the end after the whole output.
        end = f"Run {run.name} {outcome_of(run).message}, "
        messages = log_records(flow_run.id, last=end, seconds=60)
    assert state_of(flow_run.id).is_completed(), (tmp_path / "log").read_text()[-3000:]
    lines = [line for message in messages for line in message.split("\n")]
    assert lines.count("within-budget") == 1
    assert not {"by-print-1", "by-print-2"} & set(lines)
    assert [line for line in lines if "longer than its budget" in line] == [
        f"The log is longer than its budget of 16 bytes; the rest is not shown here. See {run.url}"
    ]


def test_a_cancellation_during_the_search_for_a_machine_stops_it(pool: str, tmp_path: Path) -> None:
    wanted = {"resources": {"gpu": "1000"}, "retry": {"on_events": ["no-capacity"], "duration": "1h"}}
    with LocalServer(retry_seconds=300) as full, worker(full, pool, tmp_path / "log"):
        flow_run = start(deploy(pool, **wanted))
        until(lambda: read(flow_run).infrastructure_pid, seconds=START_SECONDS)
        cancelled = cancel(flow_run)
        until(lambda: the_run(full).outcome(), seconds=30)
        seconds = time.monotonic() - cancelled
        print(f"pending: stopped {seconds:.1f} s after the cancellation")  # noqa: T201
        until(lambda: state_of(flow_run.id).is_cancelled(), seconds=10)
        assert seconds < 10
        assert outcome_of(the_run(full)).reason == "stopped_by_user"
        assert submissions(full) == 1


def test_a_cancellation_while_the_flow_runs_leaves_no_machine(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    flow_run = start(deploy(pool), until=str(tmp_path / "never"))
    with worker(dstack, pool, tmp_path / "log"):
        log_records(flow_run.id, last="by-the-logger", seconds=START_SECONDS)
        cancel(flow_run)
        until(lambda: state_of(flow_run.id).is_cancelled(), seconds=60)
        until(lambda: the_run(dstack).outcome(), seconds=60)
        assert state_of(flow_run.id).is_cancelled()


def test_a_killed_machine_has_its_flow_run_in_the_event(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    flow_run_id = uuid4()
    with dstack.client() as client:
        run = client.runs.submit(
            {"type": "task", "commands": ["sleep 60"]},
            run_name="machine",
            marker=f"{worker_marker_prefix(flow_run_id)}1",
        )
    machines = DstackWorker(work_pool_name="any")
    configuration = DstackJobConfiguration(credentials=credentials)
    asyncio.run(machines.kill_infrastructure("main:machine", configuration))
    until(lambda: event_names(run.id) == ["dstack.run.stopping"], seconds=30)
    assert events_of(run.id)[0]["payload"] == {"url": run.url, "flow_run_id": str(flow_run_id)}


def test_killing_the_infrastructure(dstack: LocalServer, credentials: DstackCredentials) -> None:
    configuration = DstackJobConfiguration(credentials=credentials)
    machines = DstackWorker(work_pool_name="any")

    def kill(pid: str) -> None:
        asyncio.run(machines.kill_infrastructure(pid, configuration))

    with dstack.client() as client:
        run = client.runs.submit({"type": "task", "commands": ["sleep 60"]}, run_name="machine")
        kill("main:machine")
        until(lambda: run.refresh().outcome(), seconds=20)
        assert outcome_of(run).reason == "stopped_by_user"
    for gone in ("main:machine", "main:no-such-run"):
        with pytest.raises(InfrastructureNotFound):
            kill(gone)
    with pytest.raises(InfrastructureNotAvailable, match="other"):
        kill("other:machine")


def inside(
    pool: str,
    flow_run: FlowRun,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
    command: str = "sleep 60",
    **fields: Any,
) -> int:
    """Run a machine by a worker in this process; return its status code."""
    monkeypatch.setattr(_worker_runs, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(_worker_runs, "GRACE_SECONDS", 1.0)
    configuration = DstackJobConfiguration(
        credentials=credentials,
        command=command,
        env={"PREFECT_API_URL": os.environ["PREFECT_API_URL"]},
        poll_interval=0.2,
        **fields,
    )

    async def go() -> int:
        async with DstackWorker(work_pool_name=pool) as machines:
            if state_of(flow_run.id).is_scheduled():
                # As Prefect hands it out; a scheduled one would be executed again.
                await machines.client.set_flow_run_state(flow_run.id, Pending(), force=True)
            status = (await machines.run(flow_run, configuration)).status_code
            await asyncio.gather(*machines._background)
            return status

    return asyncio.run(go())


def test_a_machine_that_outlasts_its_flow_run_is_stopped(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_run = start(deploy(pool))

    def complete() -> None:
        until(lambda: is_running(dstack))
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Running(), force=True)
            client.set_flow_run_state(flow_run.id, Completed(), force=True)

    completing = threading.Thread(target=complete)
    completing.start()
    assert inside(pool, flow_run, credentials, monkeypatch) == 0
    completing.join()
    run = the_run(dstack)
    assert outcome_of(run).reason == "stopped_by_user"
    assert state_of(flow_run.id).is_completed()
    until(lambda: "dstack.run.terminated" in event_names(run.id), seconds=30)
    assert event_names(run.id) == ["dstack.run.started", "dstack.run.stopping", "dstack.run.terminated"]


@pytest.mark.parametrize("state", [Cancelling, Cancelled, Crashed, Completed])
def test_a_flow_run_that_ended_before_the_submission_gets_no_machine(
    state: Any,
    pool: str,
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow_run = start(deploy(pool))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, state(), force=True)
    assert inside(pool, flow_run, credentials, monkeypatch) == 0
    assert submissions(dstack) == 0
    ended = state_of(flow_run.id)
    assert ended.is_cancelled() if state is Cancelling else ended.type is state().type


def test_runs_of_a_flow_run_whose_machine_died_are_stopped_and_reported(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks of the flow run on the machine and end with it."""
    flow_run = start(deploy(pool))
    with dstack.client() as client:
        left = client.runs.submit(
            {"type": "task", "commands": ["sleep 60"]},
            run_name="left",
            marker=f"{flow_run_marker_prefix(str(flow_run.id))}stop/abc-0/1",
        )
    assert inside(pool, flow_run, credentials, monkeypatch, command="exit 3") == 3
    until(lambda: left.refresh().outcome(), seconds=60)
    assert outcome_of(left).reason == "stopped_by_user"
    until(lambda: "dstack.run.terminated" in event_names(left.id), seconds=60)


def test_an_execution_after_an_ended_machine_gets_a_new_one(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executed again, a flow run gets a new machine."""
    flow_run = start(deploy(pool))
    inside(pool, flow_run, credentials, monkeypatch, command="exit 3")
    inside(pool, flow_run, credentials, monkeypatch, command="exit 3")
    first, second = (run.name for run in all_runs(dstack))
    assert second == f"{first}-2"


def test_a_machine_that_is_interrupted_is_the_same_machine_again(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_run = start(deploy(pool))
    for seconds in (0, 0.5):
        dstack.scenarios.interrupt_after(seconds, noticed_after=0)
    status = inside(
        pool,
        flow_run,
        credentials,
        monkeypatch,
        command="sleep 1",
        survive={"duration": "1h", "checkpoint": "/shared/checkpoints"},
        configuration={"volumes": ["/nfs:/shared"]},
        spot_policy="spot",
    )
    assert status == 0
    (run,) = dstack.runs
    assert run.job_reasons == (*["interrupted_by_no_capacity"] * 2, "done_by_runner")
    owner = f"/shared/checkpoints/worker-{flow_run.id}-"
    assert run.configuration["env"]["DSTACK_CHECKPOINT"].startswith(owner)


def test_two_workers_at_once_submit_one_machine(dstack: LocalServer, credentials: DstackCredentials) -> None:
    flow_run_id = uuid4()
    configuration = DstackJobConfiguration(
        credentials=credentials,
        command="sleep 60",
        env={"PREFECT_API_URL": os.environ["PREFECT_API_URL"]},
    )

    async def both() -> set[str]:
        async with credentials.get_async_client() as one, credentials.get_async_client() as other:
            runs = await asyncio.gather(
                *(submit_once(client, flow_run_id, configuration) for client in (one, other))
            )
            return {run.id for run in runs}

    assert len(asyncio.run(both())) == len(all_runs(dstack)) == 1
