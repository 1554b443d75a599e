"""Workers that are killed: a restart or other workers of the pool continue with their machines."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Pending, Running

from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackWorker, _worker_runs
from prefect_dstack._worker_runs import claim, orphans
from prefect_dstack._worker_variables import DstackJobConfiguration
from tests.callback_journal import VARIABLE, calls, count, lines_of
from tests.replaced import replace_in

from .machines import START_SECONDS, cancel, deploy, new_pool, read, start, the_line, worker
from .support import all_runs, log_records, outcome_of, state_of, stops, submissions, the_run, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("prefect_server")]

TAKEN = "watches this flow run from now on"
# No offer has so many GPUs: dstack searches for the machine until the run is stopped.
NOWHERE = {"resources": {"gpu": "1000"}, "retry": {"on_events": ["no-capacity"], "duration": "1h"}}


@pytest.fixture
def pool() -> str:
    """Create a work pool for one test."""
    return new_pool()


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.matrix
def test_a_killed_worker_started_again_watches_the_same_machine(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    flow_run = start(deploy(pool), until=str(go))
    with worker(dstack, pool, tmp_path / "log") as first:
        the_line(flow_run, "by-print-1", "by-print-1")
        os.kill(first.pid, signal.SIGKILL)
    with worker(dstack, pool, tmp_path / "log"):
        log_records(flow_run.id, last="watches this flow run from now on", seconds=START_SECONDS)
        go.touch()
        until(lambda: state_of(flow_run.id).is_completed(), seconds=60)
        assert the_line(flow_run, "by-print-2", "by-print-2") == 1
        assert the_line(flow_run, "by-print-1", "by-print-2") == 1
    assert len(all_runs(dstack)) == 1


@pytest.mark.matrix
def test_a_flow_run_that_a_killed_worker_did_not_submit_gets_its_machine(
    pool: str, dstack: LocalServer, tmp_path: Path
) -> None:
    flow_run = start(deploy(pool))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Pending())
    with worker(dstack, pool, tmp_path / "log"):
        until(lambda: state_of(flow_run.id).is_completed(), seconds=START_SECONDS)
    run = the_run(dstack)
    assert read(flow_run).infrastructure_pid == f"{dstack.project}:{run.name}"


@pytest.mark.matrix
def test_one_of_two_other_workers_continues_for_a_killed_one(
    pool: str, dstack: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, log, journal = tmp_path / "go", tmp_path / "log", tmp_path / "callbacks"
    monkeypatch.setenv(VARIABLE, str(journal))
    flow_run = start(deploy(pool, callbacks=["tests.callback_journal.Journal"]), until=str(go))
    with worker(dstack, pool, log, "first") as first:
        the_line(flow_run, "by-print-1", "by-print-1")
        kill(first)
    with worker(dstack, pool, log, "second"), worker(dstack, pool, log, "third"):
        log_records(flow_run.id, last=TAKEN, seconds=START_SECONDS)
        go.touch()
        until(lambda: the_run(dstack).outcome(), seconds=60)
        until(lambda: state_of(flow_run.id).is_completed(), seconds=60)
        log_records(flow_run.id, last=f"Run {the_run(dstack).name} finished,", seconds=60)
        lines = [the_line(flow_run, f"by-print-{number}", "by-print-2") for number in (1, 2)]
    assert lines == [1, 1]
    found = calls(journal, the_run(dstack).name)
    taken_over = [one.is_taken_over for one in found if one.kind == "submitted"]
    assert (taken_over, count(found, "ended")) == ([False, True], 1)
    # The worker that takes over calls for all lines again, and the log has each once.
    assert [lines_of(found).count(f"by-print-{number}") for number in (1, 2)] == [2, 1]
    assert submissions(dstack) == len(all_runs(dstack)) == 1
    assert stops(dstack) == 0
    assert outcome_of(the_run(dstack)).succeeded


@pytest.mark.matrix
@pytest.mark.parametrize("successor", ["first", "second"])
def test_a_cancellation_after_the_worker_was_killed_is_carried_out(
    successor: str, pool: str, tmp_path: Path
) -> None:
    """The search for the machine still runs: only a worker can stop it."""
    log = tmp_path / "log"
    with LocalServer(retry_seconds=300) as full:
        flow_run = start(deploy(pool, **NOWHERE))
        with worker(full, pool, log, "first") as first:
            until(lambda: read(flow_run).infrastructure_pid, seconds=START_SECONDS)
            kill(first)
        with worker(full, pool, log, successor):
            log_records(flow_run.id, last=TAKEN, seconds=START_SECONDS)
            cancelled = cancel(flow_run)
            until(lambda: the_run(full).outcome(), seconds=30)
            seconds = time.monotonic() - cancelled
            until(lambda: state_of(flow_run.id).is_cancelled(), seconds=10)
        print(f"taken over by {successor}: stopped {seconds:.1f} s after the cancellation")  # noqa: T201
        assert seconds < 10
        assert outcome_of(the_run(full)).reason == "stopped_by_user"
        assert (submissions(full), stops(full)) == (1, 1)


@pytest.mark.matrix
def test_a_cancellation_without_a_worker_is_carried_out_by_the_next_one(pool: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with LocalServer(retry_seconds=300) as full:
        flow_run = start(deploy(pool, **NOWHERE))
        with worker(full, pool, log, "first") as first:
            until(lambda: read(flow_run).infrastructure_pid, seconds=START_SECONDS)
            kill(first)
        cancel(flow_run)
        with worker(full, pool, log, "second"):
            until(lambda: the_run(full).outcome(), seconds=START_SECONDS)
            until(lambda: state_of(flow_run.id).is_cancelled(), seconds=10)
        assert outcome_of(the_run(full)).reason == "stopped_by_user"
        assert (submissions(full), stops(full)) == (1, 1)


def in_pool(pool: str, flow_run: FlowRun, ask: Callable[[PrefectClient], object]) -> object:
    """Return the result of ``ask``, a coroutine function, while the flow run is pending in the pool."""

    async def go() -> object:
        async with get_client() as client:
            await client.set_flow_run_state(flow_run.id, Pending())
            return await ask(client)  # type: ignore[misc]

    return asyncio.run(go())


def test_who_may_watch_a_flow_run(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_worker_runs, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(_worker_runs, "CLAIM_SECONDS", 0.0)
    flow_run = start(deploy(pool))

    async def ask(client: PrefectClient) -> list[list[str]]:
        async def seen_by(name: str, *watched: FlowRun) -> list[str]:
            found = await orphans(client, pool, name, {item.id for item in watched})
            return [str(item.id) for item in found]

        unclaimed = await seen_by("second")
        await client.send_worker_heartbeat(pool, "first", heartbeat_interval_seconds=30)
        await client.update_flow_run_labels(flow_run.id, {"prefect.worker.name": "first"})
        living = await seen_by("second")
        own, watched = await seen_by("first"), await seen_by("first", flow_run)
        assert not await claim(client, flow_run, "second")
        assert await claim(client, await client.read_flow_run(flow_run.id), "second")
        dead = await seen_by("first")
        await client.send_worker_heartbeat(pool, "second", heartbeat_interval_seconds=30)
        return [unclaimed, living, own, watched, dead, await seen_by("first")]

    yes, no = [str(flow_run.id)], list[str]()
    assert in_pool(pool, flow_run, ask) == [yes, no, yes, no, yes, no]


def test_a_pool_may_have_more_flow_runs_than_one_page(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_worker_runs, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(_worker_runs, "_PAGE", 2)
    deployment = deploy(pool)
    started = [start(deployment) for _ in range(3)]
    with get_client(sync_client=True) as client:
        for flow_run in started:
            client.set_flow_run_state(flow_run.id, Pending())

    async def found() -> set[UUID]:
        async with get_client() as client:
            return {item.id for item in await orphans(client, pool, "any", ())}

    assert asyncio.run(found()) == {item.id for item in started}


def test_a_later_claim_wins(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_worker_runs, "CLAIM_SECONDS", 0.0)
    flow_run, moment = start(deploy(pool)), asyncio.sleep

    async def ask(client: PrefectClient) -> list[bool]:
        async def other(_: float) -> None:
            replace_in(monkeypatch, _worker_runs, "asyncio", sleep=moment)
            assert await claim(client, await client.read_flow_run(flow_run.id), "second")

        replace_in(monkeypatch, _worker_runs, "asyncio", sleep=other)
        return [await claim(client, flow_run, "first")]

    assert in_pool(pool, flow_run, ask) == [False]


def test_a_worker_that_lost_its_claim_leaves_the_machine_to_the_other(
    pool: str, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_worker_runs, "CHECK_SECONDS", 0.2)
    flow_run = start(deploy(pool))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Running(), force=True)
    configuration = DstackJobConfiguration(
        credentials=credentials,
        command="sleep 60",
        env={"PREFECT_API_URL": os.environ["PREFECT_API_URL"]},
        poll_interval=0.2,
    )

    async def go() -> int:
        async with DstackWorker(work_pool_name=pool, name="first") as machines:
            watching = asyncio.create_task(machines.run(flow_run, configuration))
            await asyncio.to_thread(until, lambda: any(r.raw_status == "running" for r in all_runs(dstack)))
            await machines.client.update_flow_run_labels(flow_run.id, {"prefect.worker.name": "second"})
            return (await asyncio.wait_for(watching, 20)).status_code

    assert asyncio.run(go()) == 0
    assert the_run(dstack).raw_status == "running"
    assert state_of(flow_run.id).is_running()
