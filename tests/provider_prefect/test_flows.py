"""Flows against a real Prefect server and an embedded dstack server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow, unmapped
from prefect.runtime import flow_run

from dstack_core import RunFailedError, RunNameTakenError, RunStatus, ServerUnreachableError, Service, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task

from .support import all_runs, log_records, outcome_of, submissions, the_run, until

pytestmark = pytest.mark.usefixtures("prefect_server")

FAST: dict[str, Any] = {"poll_interval": 0.1}
THREE_LINES = Task(commands=["for i in 1 2 3; do echo line $i; sleep 0.1; done"])

Runner = Callable[..., dict[str, Any]]


def sync_direct(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    def direct() -> dict[str, Any]:
        return dict(run_task(*args, **options))

    return direct()


def sync_submitted(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    def submitted() -> dict[str, Any]:
        return dict(run_task.submit(*args, **options).result())

    return submitted()


def async_direct(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    async def adirect() -> dict[str, Any]:
        return dict(await arun_task(*args, **options))

    return asyncio.run(adirect())


def async_submitted(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    async def asubmitted() -> dict[str, Any]:
        return dict(await asyncio.to_thread(arun_task.submit(*args, **options).result))

    return asyncio.run(asubmitted())


def async_task_in_sync_flow(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    def mixed() -> dict[str, Any]:
        return dict(arun_task.submit(*args, **options).result())

    return mixed()


WAYS = [sync_direct, sync_submitted, async_direct, async_submitted, async_task_in_sync_flow]


@pytest.mark.parametrize("run", WAYS)
def test_the_outcome_is_returned(run: Runner, dstack: LocalServer, credentials: DstackCredentials) -> None:
    outcome = run(THREE_LINES, credentials, **FAST)
    assert outcome["status"] == "done"
    assert outcome["exit_status"] == 0
    assert outcome == json.loads(json.dumps(outcome)) == outcome_of(the_run(dstack)).to_dict()
    assert dstack.token not in json.dumps(outcome)


@pytest.mark.parametrize("run", WAYS)
def test_a_failed_run_fails_the_task_with_its_last_words(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(RunFailedError) as caught:
        run(Task(commands=["echo out of memory", "exit 7"]), credentials, **FAST)
    assert "exited with status 7" in str(caught.value)
    assert "out of memory" in str(caught.value)
    assert caught.value.outcome.exit_status == 7
    assert submissions(dstack) == 1


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_every_log_line_arrives_once_and_in_order(task: Any, credentials: DstackCredentials) -> None:
    count = 1500
    ids: list[UUID] = []
    command = (
        f"for i in $(seq {count}); do echo row-$i; [ $((i % 300)) = 0 ] && sleep 0.15; done; echo the-end"
    )

    @flow
    def talking() -> None:
        ids.append(UUID(flow_run.get_id()))
        task.submit({"type": "task", "commands": [command]}, credentials, **FAST).result()

    talking()
    messages = log_records(ids[0], last="the-end")
    rows = [line for message in messages for line in message.split("\n") if line.startswith("row-")]
    assert rows == [f"row-{number}" for number in range(1, count + 1)]
    assert len(messages) < 60


def test_nothing_secret_is_logged(dstack: LocalServer, credentials: DstackCredentials) -> None:
    ids: list[UUID] = []

    @flow
    def secretive() -> None:
        ids.append(UUID(flow_run.get_id()))
        run_task(Task(commands=["echo the-end"], env={"KEY": "env-s3cr3t"}), credentials, **FAST)

    secretive()
    told = "\n".join(log_records(ids[0], last="the-end"))
    assert dstack.token not in told
    assert "env-s3cr3t" not in told


def test_mapped_tasks_have_runs_of_their_own(dstack: LocalServer, credentials: DstackCredentials) -> None:
    commands: list[Any] = [{"type": "task", "commands": [f"echo {word}"]} for word in ("a", "a", "b")]

    @flow
    def mapped() -> list[dict[str, Any]]:
        return list(run_task.map(commands, credentials=unmapped(credentials), **FAST).result())

    outcomes = mapped()
    assert [outcome["status"] for outcome in outcomes] == ["done"] * 3
    assert len({outcome["run_name"] for outcome in outcomes}) == 3
    assert len(all_runs(dstack)) == 3


def test_the_environment_and_a_file_are_enough(
    dstack: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SERVER_URL", dstack.url), ("PROJECT", dstack.project), ("TOKEN", dstack.token)):
        monkeypatch.setenv(f"DSTACK_{name}", value)
    path = tmp_path / "train.dstack.yml"
    path.write_text("type: task\nname: train\ncommands:\n  - echo hi\n")
    assert sync_direct(str(path), **FAST)["run_name"].startswith("train-")
    assert async_direct(path, **FAST)["status"] == "done"


def test_a_local_port_that_is_taken_on_the_worker_does_not_matter(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        task = Task(commands=["true"], ports=[held.getsockname()[1]])
        assert run_task(task, credentials, **FAST)["status"] == "done"


def test_outside_a_flow_a_task_works_too(dstack: LocalServer, credentials: DstackCredentials) -> None:
    assert run_task(THREE_LINES, credentials, **FAST)["status"] == "done"
    assert run_task(THREE_LINES, credentials, **FAST)["status"] == "done"
    assert len(all_runs(dstack)) == 2


@pytest.mark.parametrize(
    ("configured", "given", "sent"),
    [
        ({}, None, 86400),
        ({"max_duration": "2h"}, None, 7200),
        ({"max_duration": "2h"}, 600, 600),
        ({}, "off", "off"),
    ],
)
def test_a_run_has_a_longest_duration(
    configured: dict[str, Any], given: Any, sent: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    configuration = {"type": "task", "commands": ["true"], **configured}
    outcome = sync_direct(configuration, credentials, max_duration=given, **FAST)
    reply = httpx.post(
        f"{dstack.url}/api/project/{dstack.project}/runs/get",
        headers={"Authorization": f"Bearer {dstack.token}"},
        json={"run_name": outcome["run_name"]},
    )
    assert reply.json()["run_spec"]["configuration"]["max_duration"] == sent


def test_a_max_duration_ends_the_run(credentials: DstackCredentials) -> None:
    with pytest.raises(RunFailedError, match="max_duration"):
        sync_direct(Task(commands=["sleep 60"]), credentials, max_duration=1, **FAST)


def test_a_retried_task_submits_a_failed_run_again(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    configuration = Task(commands=[f"test -e {tmp_path}/seen || {{ touch {tmp_path}/seen; exit 1; }}"])

    @flow
    def retrying() -> dict[str, Any]:
        return dict(
            run_task.with_options(retries=1, retry_delay_seconds=0)(configuration, credentials, **FAST)
        )

    outcome = retrying()
    first, second = all_runs(dstack)
    assert (first.raw_status, second.raw_status) == ("failed", "done")
    assert outcome["run_name"] == second.name == f"{first.name}-2"


def test_a_retried_flow_takes_over_what_succeeded(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    attempts: list[list[dict[str, Any]]] = []

    @flow(retries=1, retry_delay_seconds=0)
    def retrying() -> None:
        attempts.append([run_task(THREE_LINES, credentials, **FAST) for _ in range(2)])
        if len(attempts) == 1:
            raise RuntimeError("something else failed")

    retrying()
    assert attempts[0] == attempts[1]
    assert len(all_runs(dstack)) == 2


def test_a_task_that_lost_sight_of_its_run_finds_it_again(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    """The retry budget is spent while the run goes on; the retry takes the same run."""
    configuration = Task(commands=["sleep 3; echo the-end"])

    @flow
    def retrying() -> dict[str, Any]:
        task = run_task.with_options(retries=3, retry_delay_seconds=1)
        return dict(task(configuration, credentials, retry_budget=0.5, **FAST))

    def break_the_line() -> None:
        until(lambda: any(run.raw_status == "running" for run in all_runs(dstack)))
        fault = dstack.faults.add("/runs/get", status=503, times=None)
        time.sleep(1.5)
        fault.times = 1

    breaker = threading.Thread(target=break_the_line)
    breaker.start()
    outcome = retrying()
    breaker.join()
    assert outcome["status"] == "done"
    assert submissions(dstack) == 1
    assert the_run(dstack).id == outcome["run_id"]


@pytest.mark.parametrize("run", [sync_submitted, async_direct])
def test_a_lost_connection_neither_fails_nor_doubles(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    dstack.faults.add("/runs/apply", drop="after")
    dstack.faults.add("/runs/get", status=503, times=3)
    dstack.faults.add("/logs/poll", drop="before", times=2)
    assert run(Task(commands=["echo hi; sleep 1"]), credentials, **FAST)["status"] == "done"
    assert len(all_runs(dstack)) == 1


@pytest.mark.parametrize("run", [sync_direct, async_direct])
def test_a_server_that_stays_silent_ends_the_patience_and_not_the_run(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    def hang_up() -> None:
        until(lambda: any(run.raw_status == "running" for run in all_runs(dstack)))
        dstack.faults.add("/runs/get", status=503, times=None)

    breaker = threading.Thread(target=hang_up)
    breaker.start()
    with pytest.raises(ServerUnreachableError, match="503"):
        run(Task(commands=["sleep 30"]), credentials, retry_budget=1.0, **FAST)
    breaker.join()
    dstack.faults.clear()
    assert the_run(dstack).raw_status == "running"
    assert not any(request.path.endswith("/runs/stop") for request in dstack.requests)


@pytest.mark.parametrize("run", [sync_direct, async_direct])
def test_a_server_that_takes_no_submission_is_told_with_what_may_be_left(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    dstack.faults.add("/runs/apply", status=503, times=None)
    with pytest.raises(
        ServerUnreachableError, match=r"503.*retry_budget 1 s\); run pf-.* may have been submitted"
    ):
        run(THREE_LINES, credentials, retry_budget=1.0, **FAST)
    dstack.faults.clear()
    assert all_runs(dstack) == []


def test_a_callers_name_is_used_and_another_owners_run_is_left_alone(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    assert sync_direct(THREE_LINES, credentials, run_name="train", **FAST)["run_name"] == "train"
    with dstack.client() as client:
        other = client.runs.submit(Task(commands=["sleep 60"]), run_name="busy")
        with pytest.raises(RunNameTakenError, match="busy"):
            sync_direct(THREE_LINES, credentials, run_name="busy", **FAST)
        assert other.status() is not RunStatus.TERMINATED
        other.stop()


@pytest.mark.parametrize("run", [sync_direct, sync_submitted, async_direct])
def test_a_task_timeout_stops_the_run(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, task in (("run_task", run_task), ("arun_task", arun_task)):
        monkeypatch.setitem(globals(), name, task.with_options(timeout_seconds=3))
    with pytest.raises(TimeoutError):
        run(Task(commands=["sleep 60"]), credentials, **FAST)
    assert outcome_of(the_run(dstack)).status is RunStatus.TERMINATED


def test_submitted_tasks_may_finish_when_their_flow_returns(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def returning() -> str:
        run_task.submit(Task(commands=["sleep 3"]), credentials, **FAST)
        until(lambda: all_runs(dstack))
        return "early"

    assert returning() == "early"
    assert outcome_of(the_run(dstack)).status is RunStatus.DONE


def test_a_service_runs_until_it_is_stopped(dstack: LocalServer, credentials: DstackCredentials) -> None:
    def stop() -> None:
        until(lambda: any(run.raw_status == "running" for run in all_runs(dstack)))
        the_run(dstack).stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Exception, match="stopped by a user"):
        sync_direct(Service(commands=["sleep 60"], port=8000), credentials, **FAST)
    stopper.join()
