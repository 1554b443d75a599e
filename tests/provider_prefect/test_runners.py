"""The task runners of Dask and Ray, which give a freed worker the next task of a cancelled flow run."""

from __future__ import annotations

import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.sorting import LogSort
from prefect.states import Cancelling
from pydantic import SecretStr

from dstack_core import Run
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _followers
from prefect_dstack.reaper import reap
from tests.callback_journal import VARIABLE, Call, calls

from .hosts import module
from .support import (
    all_runs,
    artifacts_of,
    event_names,
    log_records,
    outcome_of,
    state_of,
    stops,
    submissions,
    task_states,
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


# Those of ``runner_flows``, which only the environment of these tests can import.
WORKERS, LINES = 4, 20
MAPPED = 50


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file in which the workers note each call of a callback."""
    return tmp_path_factory.mktemp("journal") / "calls"


@pytest.fixture(scope="module")
def served(
    prefect_server: str, journal: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("runners") / "log"
    with LocalServer(step_seconds=0.02, stop_grace_seconds=GRACE) as server:
        environment = {
            **os.environ,
            "DSTACK_SERVER_URL": server.url,
            "DSTACK_PROJECT": server.project,
            "DSTACK_TOKEN": server.token,
            # Ray unpickles flows, for which it imports their module by the name that serve() gives it.
            VARIABLE: str(journal),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A busy machine needs more than Dask's 15 s to start a worker in place of a killed one.
            "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "120s",
        }
        with module("tests.provider_prefect.runner_flows", log=log, environment=environment) as process:
            until(lambda: process.poll() is not None or deployed(), seconds=START_SECONDS)
            assert process.poll() is None, log.read_text()[-3000:]
            yield server


def deployed() -> bool:
    with get_client(sync_client=True) as client:
        return {"dask_sweep", "ray_sweep", "ray_lost"} <= {made.name for made in client.read_deployments()}


def runs_of(server: LocalServer, flow_run_id: UUID) -> list[Run]:
    return [run for run in all_runs(server) if f"/{flow_run_id}/" in (run.marker or "")]


def start(name: str, server: LocalServer, **parameters: Any) -> UUID:
    """Start a flow run and wait until its first run has started.

    Ray must start within 30 s, which a busy machine misses: then the flow run crashes and another one starts.
    """

    def is_running(flow_run_id: UUID) -> bool:
        return any(run.raw_status in ("running", "done") for run in runs_of(server, flow_run_id))

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{name.replace('_', '-')}/{name}")
        for _ in range(3):
            flow_run_id = client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id
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


BOTH = pytest.mark.parametrize("runner", ["dask", "ray"])


def lines(number: int) -> list[str]:
    return [*(f"part {number} line {line}" for line in range(1, LINES + 1)), f"part {number} after"]


def logs_by_task(flow_run_id: UUID) -> dict[str, list[str]]:
    """Return the lines in the log of each task run that the commands printed, by the end of its id."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    offset = 0
    with get_client(sync_client=True) as client:
        while page := client.read_logs(
            LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])),
            limit=200,
            offset=offset,
            sort=LogSort.TIMESTAMP_ASC,
        ):
            offset += len(page)
            for record in page:
                printed = [line for line in record.message.splitlines() if line.startswith("part ")]
                if printed:
                    found[str(record.task_run_id)[-8:]] += printed
    return found


def owner_tail(run: Run) -> str:
    """Return the end of the id of the task run that submitted a run."""
    return (run.marker or "").split("/")[-2].rpartition("-")[2]


def submitted(journal: Path, run: Run) -> list[Call]:
    return [call for call in calls(journal, run.name) if call.kind == "submitted"]


def completed(flow_run_id: UUID) -> bool:
    state = state_of(flow_run_id)
    assert not state.is_final() or state.is_completed(), state
    return bool(state.is_completed())


@BOTH
def test_each_of_fifty_mapped_tasks_has_one_run_and_its_own_log(
    runner: str, served: LocalServer, tmp_path: Path
) -> None:
    (go := tmp_path / "go").touch()
    flow_run_id = start(f"{runner}_map", served, count=MAPPED, file=str(go))
    until(lambda: completed(flow_run_id), seconds=START_SECONDS, what="the flow run has completed")
    runs = runs_of(served, flow_run_id)
    assert len(runs) == len({run.name for run in runs}) == MAPPED
    assert {run.raw_status for run in runs} == {"done"}
    assert all(run.name.startswith(f"{runner}-map-part-") for run in runs)
    expected = sorted(lines(number) for number in range(MAPPED))

    def all_logged() -> bool:
        return sum(map(len, logs_by_task(flow_run_id).values())) >= sum(map(len, expected))

    until(all_logged, seconds=60, pause=1, what="all lines are in Prefect's log")
    logged = logs_by_task(flow_run_id)
    assert {owner_tail(run) for run in runs} == set(logged)
    assert sorted(logged.values()) == expected
    for run in runs:
        (first, *_) = logged[owner_tail(run)]
        assert run.name.startswith(f"{runner}-map-part-{first.split()[1]}-")


@BOTH
def test_a_cancellation_stops_what_all_workers_run_and_submits_nothing_more(
    runner: str, served: LocalServer, tmp_path: Path
) -> None:
    flow_run_id = start(f"{runner}_map", served, count=3 * WORKERS, file=str(tmp_path / "never"))
    until(
        lambda: Counter(run.raw_status for run in runs_of(served, flow_run_id))["running"] == WORKERS,
        seconds=START_SECONDS,
        what="each worker has a run",
    )
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelling())
    submitted_before = submissions(served)
    until(lambda: state_of(flow_run_id).is_cancelled(), seconds=90, what="the flow run is Cancelled")
    runs = runs_of(served, flow_run_id)
    assert len(runs) == WORKERS
    assert submissions(served) == submitted_before
    assert {outcome_of(run).reason for run in runs} == {"stopped_by_user"}
    assert stops(served) >= WORKERS


def logged_lines(flow_run_id: UUID, count: int) -> dict[str, list[str]]:
    """Return the lines of each task run once there are as many as the runs have printed."""
    wanted = count * (LINES + 1)
    until(lambda: sum(map(len, logs_by_task(flow_run_id).values())) >= wanted, seconds=60, pause=1)
    return logs_by_task(flow_run_id)


def kill_worker_of(run: Run, journal: Path) -> Call:
    """Kill the worker that follows the run once Prefect knows that it does; return what it had noted."""
    (call,) = until(lambda: submitted(journal, run))
    until(lambda: "dstack.run.started" in event_names(run.id), what="the event of the start")
    os.kill(call.process, signal.SIGKILL)
    return call


# Dask gives a free worker the repeated task first. Ray gives it a queued one, so here none is queued.
@pytest.mark.parametrize(("runner", "count"), [("dask", 2 * WORKERS), ("ray", WORKERS)], ids=["dask", "ray"])
def test_the_task_of_a_killed_worker_takes_its_run_over(
    runner: str, count: int, served: LocalServer, journal: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    flow_run_id = start(f"{runner}_map", served, count=count, file=str(go))
    until(
        lambda: Counter(run.raw_status for run in runs_of(served, flow_run_id))["running"] == WORKERS,
        seconds=START_SECONDS,
        what="each worker has a run",
    )
    run = runs_of(served, flow_run_id)[0]
    kill_worker_of(run, journal)
    until(lambda: len(submitted(journal, run)) == 2, seconds=START_SECONDS, what="another worker took over")
    first, second = submitted(journal, run)
    assert (first.is_taken_over, second.is_taken_over) == (False, True)
    assert first.process != second.process
    assert len(runs_of(served, flow_run_id)) == WORKERS
    go.touch()
    until(lambda: completed(flow_run_id), seconds=START_SECONDS, what="the flow run has completed")
    runs = runs_of(served, flow_run_id)
    assert len(runs) == len({run.name for run in runs}) == count
    assert {run.refresh().raw_status for run in runs} == {"done"}
    # Those that the killed worker logged, and behind them the others.
    logged = logged_lines(flow_run_id, count)
    assert {owner_tail(run) for run in runs} == set(logged)
    assert sorted(logged.values()) == sorted(lines(number) for number in range(count))


def test_a_task_that_ray_repeats_behind_queued_ones_takes_the_end_of_its_run(
    served: LocalServer, journal: Path, tmp_path: Path
) -> None:
    count, go = WORKERS + 1, tmp_path / "go"
    flow_run_id = start("ray_map", served, count=count, file=str(go))
    until(
        lambda: Counter(run.raw_status for run in runs_of(served, flow_run_id))["running"] == WORKERS,
        seconds=START_SECONDS,
        what="each worker has a run",
    )
    run = runs_of(served, flow_run_id)[0]
    kill_worker_of(run, journal)
    until(
        lambda: len(runs_of(served, flow_run_id)) == count or len(submitted(journal, run)) == 2,
        seconds=START_SECONDS,
        what="the queued task, or the repeated one, has a worker",
    )
    go.touch()
    until(lambda: completed(flow_run_id), seconds=START_SECONDS, what="the flow run has completed")
    runs = runs_of(served, flow_run_id)
    assert len(runs) == count
    assert {run.refresh().raw_status for run in runs} == {"done"}
    assert [call.is_taken_over for call in submitted(journal, run)] == [False, True]
    assert sorted(logged_lines(flow_run_id, count).values()) == sorted(map(lines, range(count)))


@BOTH
def test_the_reaper_stops_what_a_killed_worker_leaves(
    runner: str,
    served: LocalServer,
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow_run_id = start(f"{runner}_lost", served, count=1, file=str(tmp_path / "never"))
    (run,) = runs_of(served, flow_run_id)
    kill_worker_of(run, journal)
    until(lambda: state_of(flow_run_id).is_final(), seconds=START_SECONDS, what="the flow run has ended")
    assert state_of(flow_run_id).is_failed()
    assert task_states(flow_run_id) == ["RUNNING"]
    block = DstackCredentials(
        server_url=served.url, project_name=served.project, user_token=SecretStr(served.token)
    )

    def finding() -> dict[str, Any]:
        (found,) = [found for found in reap(block, min_age=0) if found["run_name"] == run.name]
        return dict(found)

    # A task that outlasts its flow is Running, too, and shows that it is alive.
    assert (finding()["stopped"], finding()["reason"]) == (False, "a task of its flow run still runs")
    monkeypatch.setattr(_followers, "SILENT_SECONDS", 0.0)
    assert finding()["stopped"]
    assert outcome_of(run).reason == "stopped_by_user"
    assert len(runs_of(served, flow_run_id)) == 1
