"""Runs are found again: after a retry of the task or flow, a lost reply, an unreachable server."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from dstack_core import RunFailedError, ServerUnreachableError, Task
from dstack_core.integration import AttemptNames
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _job, run_task
from prefect_dstack._names import Owner, identify

from .support import all_runs, is_running, submissions, the_run, until
from .ways import FAST, THREE_LINES, Runner, async_direct, sync_direct, sync_submitted

pytestmark = pytest.mark.usefixtures("prefect_server")


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


def test_a_retry_after_an_upgrade_finds_the_run_of_the_earlier_version(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def of_an_earlier_version(owner: Owner, *args: Any, **options: Any) -> AttemptNames:
        found = identify(replace(owner, flow_run_count=9), *args, **options)
        return replace(found, base=found.former_base or "", former_base=None)

    @flow(retries=1, retry_delay_seconds=0)
    def retrying() -> None:
        with monkeypatch.context() as patched:
            if not names:
                patched.setattr(_job, "identify", of_an_earlier_version)
            names.append(run_task(THREE_LINES, credentials, **FAST)["run_name"])
        if len(names) == 1:
            raise RuntimeError("upgraded meanwhile")

    retrying()
    assert names[0] == names[1] == the_run(dstack).name
    assert names[0].startswith("pf-")


def test_a_task_that_could_not_reach_the_server_finds_its_run_again(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    """The retry budget is spent while the run keeps running; the retry takes the same run."""
    configuration = Task(commands=["sleep 3; echo the-end"])

    @flow
    def retrying() -> dict[str, Any]:
        task = run_task.with_options(retries=3, retry_delay_seconds=1)
        return dict(task(configuration, credentials, retry_budget=0.5, **FAST))

    def break_the_line() -> None:
        until(lambda: is_running(dstack))
        fault = dstack.faults.add("/runs/get", status=503, times=None)
        until(lambda: "is no longer followed" in caplog.text)
        fault.times = 1

    breaker = threading.Thread(target=break_the_line)
    breaker.start()
    outcome = retrying()
    breaker.join()
    assert outcome["status"] == "done"
    assert submissions(dstack) == 1
    assert the_run(dstack).id == outcome["run_id"]


@pytest.mark.parametrize("run", [sync_submitted, async_direct])
def test_a_lost_connection_neither_fails_the_task_nor_submits_twice(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    dstack.faults.add("/runs/apply", drop="after")
    dstack.faults.add("/runs/get", status=503, times=3)
    dstack.faults.add("/logs/poll", drop="before", times=2)
    assert run(Task(commands=["echo hi; sleep 1"]), credentials, **FAST)["status"] == "done"
    assert len(all_runs(dstack)) == 1


@pytest.mark.parametrize("run", [sync_direct, async_direct])
def test_a_run_that_failed_while_the_server_was_unreachable_is_not_repeated(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    """The reply to the submission is lost, and the run has failed when the server answers again."""
    dstack.faults.add("/runs/apply", drop="after", times=1)

    def break_the_line() -> None:
        until(lambda: submissions(dstack) == 1)
        fault = dstack.faults.add("/runs/get", status=503, times=None)
        until(lambda: all(run.raw_status == "failed" for run in all_runs(dstack)) and all_runs(dstack))
        fault.times = 1

    breaker = threading.Thread(target=break_the_line)
    breaker.start()
    with pytest.raises(RunFailedError):
        run(Task(commands=["exit 3"]), credentials, **FAST)
    breaker.join()
    assert len(all_runs(dstack)) == submissions(dstack) == 1


@pytest.mark.parametrize("run", [sync_direct, async_direct])
def test_an_unreachable_server_fails_the_task_and_does_not_stop_the_run(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    def hang_up() -> None:
        until(lambda: is_running(dstack))
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
def test_a_failed_submission_is_reported_with_the_run_that_may_exist(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    dstack.faults.add("/runs/apply", status=503, times=None)
    with pytest.raises(
        ServerUnreachableError,
        match=r"503.*retry budget 1 s.*\. Run \S+ may have been submitted\. .*/runs$",
    ):
        run(THREE_LINES, credentials, retry_budget=1.0, **FAST)
    dstack.faults.clear()
    assert all_runs(dstack) == []
