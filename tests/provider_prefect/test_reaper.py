"""The reaper: what it stops, what it leaves, and its command."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import (
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Pending,
    Running,
    Scheduled,
)

from dstack_core import ConfigurationError, Run
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, _followers, areap_runs, arun_task, reap_runs, reaper, run_task
from prefect_dstack._report import Report, emit
from prefect_dstack.reaper import reap

from .support import all_runs, artifacts_of, event_names, events_of, outcome_of, the_run, until

pytestmark = pytest.mark.usefixtures("prefect_server")

LONG = {"type": "task", "commands": ["sleep 60"]}


@flow
def idle() -> None:
    """Do nothing; a flow run needs a flow."""


def in_state(state: State[Any]) -> FlowRun:
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(idle)
        client.set_flow_run_state(run.id, state, force=True)
        return run


def run_of(server: LocalServer, owner: object, *, kind: str = "flow_run", on_crash: str = "stop") -> Run:
    with server.client() as client:
        return client.runs.submit(
            LONG, run_name=f"r-{uuid4().hex[:8]}", marker=f"prefect:{kind}/{owner}/{on_crash}/abc-0/1"
        )


def is_stopped(run: Run) -> bool:
    return run.status().is_stopping or run.outcome() is not None


def names(findings: list[dict[str, Any]]) -> set[str]:
    return {found["run_name"] for found in findings if found["stopped"]}


@pytest.mark.parametrize("make", [Completed, Failed, Crashed, Cancelled])
def test_a_run_whose_flow_run_has_ended_is_stopped(
    make: Callable[[], State[Any]], dstack: LocalServer, credentials: DstackCredentials
) -> None:
    left = run_of(dstack, in_state(make()).id)
    (finding,) = reap(credentials, min_age=0)
    assert finding["stopped"]
    assert is_stopped(left)


@pytest.mark.parametrize("make", [Scheduled, Pending, Running, Cancelling])
def test_a_run_whose_flow_run_has_not_ended_is_left(
    make: Callable[[], State[Any]], dstack: LocalServer, credentials: DstackCredentials
) -> None:
    left = run_of(dstack, in_state(make()).id)
    (finding,) = reap(credentials, min_age=0, stop_unknown=True)
    assert not finding["stopped"]
    assert not is_stopped(left)


def test_a_flow_run_that_just_ended_may_still_stop_its_runs_itself(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    left = run_of(dstack, in_state(Crashed()).id)
    (finding,) = reap(credentials)
    assert "ended" in finding["reason"]
    assert not is_stopped(left)


def test_a_dry_run_stops_nothing(dstack: LocalServer, credentials: DstackCredentials) -> None:
    left = run_of(dstack, in_state(Crashed()).id)
    assert names(reap(credentials, min_age=0, dry_run=True)) == {left.name}
    assert not is_stopped(left)


def test_what_is_to_be_kept_is_stopped_only_after_a_cancellation(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    run_of(dstack, in_state(Crashed()).id, on_crash="keep")
    cancelled = run_of(dstack, in_state(Cancelled()).id, on_crash="keep")
    assert names(reap(credentials, min_age=0)) == {cancelled.name}


def test_another_servers_flow_runs_are_left_unless_requested(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    foreign = run_of(dstack, uuid4())
    (finding,) = reap(credentials, min_age=0)
    assert (finding["state"], finding["stopped"]) == ("unknown", False)
    assert names(reap(credentials, min_age=0, stop_unknown=True)) == {foreign.name}


def test_runs_of_scripts_and_of_other_programs_are_ignored(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    run_of(dstack, uuid4(), kind="script")
    with dstack.client() as client:
        client.runs.submit(LONG, run_name="by-hand")
        client.runs.submit(LONG, run_name="by-airflow", marker="airflow:dag/run/task/1")
    assert reap(credentials, min_age=0, stop_unknown=True) == []


def test_the_machine_of_an_ended_flow_run_is_stopped(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    left = run_of(dstack, in_state(Cancelled()).id, kind="worker", on_crash="1")
    assert names(reap(credentials, min_age=0)) == {left.name}


def test_a_submitted_task_that_outlasts_its_flow_keeps_its_run(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    seen: list[dict[str, Any]] = []

    @flow
    def returning() -> None:
        run_task.submit({"type": "task", "commands": ["sleep 6"]}, credentials, poll_interval=0.1)
        until(lambda: all_runs(dstack))

    def look() -> None:
        until(lambda: all_runs(dstack))
        run = the_run(dstack)
        owner = (run.marker or "").split("/")[1]
        with get_client(sync_client=True) as client:
            until(lambda: client.read_flow_run(owner).state.is_final(), seconds=30)  # type: ignore[arg-type, union-attr]
        seen.extend(reap(credentials, min_age=0))

    watcher = threading.Thread(target=look)
    watcher.start()
    returning()
    watcher.join()
    assert [found["stopped"] for found in seen] == [False]
    assert outcome_of(the_run(dstack)).succeeded


LONG_AGO = 2 * _followers.SILENT_SECONDS


@pytest.mark.parametrize("task", [run_task, arun_task])
def test_a_task_that_outlasts_its_flow_shows_that_it_follows_its_run(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    def is_alive() -> bool:
        with get_client(sync_client=True) as client:
            return not _followers.has_lost_its_follower(client, the_run(dstack).id, LONG_AGO)

    def look() -> None:
        try:
            until(lambda: "dstack.run.started" in event_names(the_run(dstack).id))
            seen.append(is_alive())
            go.touch()
            until(is_alive)
        finally:
            (tmp_path / "end").touch()

    @flow
    def returning() -> None:
        wait = f"while [ ! -e {tmp_path / 'end'} ]; do sleep 0.1; done"
        task.submit({"type": "task", "commands": [wait]}, credentials, poll_interval=0.1)
        until(lambda: all_runs(dstack))
        watcher.start()
        until(go.exists)

    go, seen = tmp_path / "go", list[bool]()
    watcher = threading.Thread(target=look)
    returning()
    watcher.join()
    # While the flow runs, nothing is emitted.
    assert seen == [False]
    assert is_alive()
    assert outcome_of(the_run(dstack)).succeeded


@pytest.mark.parametrize("make", [Completed, Failed])
@pytest.mark.parametrize("was_followed", [True, False])
def test_a_task_run_whose_process_was_killed_keeps_no_run_of_an_ended_flow_run(
    was_followed: bool,
    make: Callable[[], State[Any]],
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = in_state(Running())
    left = run_of(dstack, owner.id)
    with get_client(sync_client=True) as client:
        client.create_task_run(run_task, owner.id, dynamic_key="0", state=Running())
        if was_followed:
            emit("started", left.name, left.id, {"url": left.url})
            until(lambda: event_names(left.id))
        monkeypatch.setattr(_followers, "SILENT_SECONDS", 0.0)
        assert reap(credentials, min_age=0)[0]["reason"] == "its flow run has not ended"
        client.set_flow_run_state(owner.id, make(), force=True)
        monkeypatch.undo()
        # It may be alive and not have shown it yet.
        assert reap(credentials, min_age=0)[0]["reason"] == "a task of its flow run still runs"
    assert not is_stopped(left)
    monkeypatch.setattr(_followers, "SILENT_SECONDS", 0.0)
    (finding,) = reap(credentials, min_age=0)
    assert (finding["stopped"], is_stopped(left)) == (was_followed, was_followed)
    assert ("no process follows it" in finding["reason"]) == was_followed


def test_a_heartbeat_is_rare_and_one_that_prefect_refuses_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def emit_event(name: str, **_: object) -> None:
        emitted.append(name)
        raise RuntimeError("refused")

    emitted: list[str] = []
    monkeypatch.setattr("prefect.events.emit_event", emit_event)
    times = [0.0, 1.0, _followers.BEAT_SECONDS, _followers.BEAT_SECONDS + 1]
    heartbeat = _followers.Heartbeat(logging.getLogger("heartbeat"), clock=iter(times).__next__)
    caplog.set_level(logging.DEBUG, "heartbeat")
    for _ in times:
        heartbeat.emit("run")
    assert emitted == ["dstack.follower.alive"] * 2
    assert caplog.messages == ["Prefect did not take an event: refused"] * 2


@pytest.mark.parametrize("twin", [False, True])
def test_the_task_reaps_in_a_flow(twin: bool, dstack: LocalServer, credentials: DstackCredentials) -> None:
    left = run_of(dstack, in_state(Crashed()).id)

    @flow
    def tidy() -> Any:
        return reap_runs(credentials, min_age=0)

    @flow
    async def atidy() -> Any:
        return await areap_runs(credentials, min_age=0)

    findings: Any = asyncio.run(atidy()) if twin else tidy()
    assert names(findings) == {left.name}
    assert is_stopped(left)


def unreported(server: LocalServer, owner: FlowRun, name: str, *, artifacts: bool = True) -> Run:
    """Leave a run that was stopped and has ended, but whose end was not reported."""
    with server.client() as client:
        run = client.runs.submit(LONG, run_name=name, marker=f"prefect:flow_run/{owner.id}/stop/abc-0/1")
    report = Report(name, logging.getLogger("killed"), artifacts=artifacts, flow_run_id=owner.id)
    report.start(run)
    report.stopping(run.stop(until="ended"))
    return run


@pytest.mark.parametrize("artifacts", [True, False])
def test_an_end_that_was_not_reported_is_reported_once(
    artifacts: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    mine = in_state(Crashed())
    run = unreported(dstack, mine, f"r-{uuid4().hex[:8]}", artifacts=artifacts)
    if not artifacts:
        # Without an artifact only the event of the stop names the run.
        until(lambda: "dstack.run.stopping" in event_names(run.id), seconds=30)
    (finding,) = reap(credentials, min_age=0)
    assert (finding["run_name"], finding["stopped"]) == (run.name, False)
    assert finding["owner"] == f"flow_run/{mine.id}"
    until(lambda: "dstack.run.terminated" in event_names(run.id), seconds=30)
    assert reap(credentials, min_age=0) == []
    emit("probe", run.name, run.id, {})
    until(lambda: "dstack.run.probe" in event_names(run.id), seconds=30)
    assert event_names(run.id).count("dstack.run.terminated") == 1
    if artifacts:
        found = artifacts_of(mine.id)
        assert found[f"dstack-{run.name}-progress"].data == 100.0
        assert "terminated" in found[f"dstack-{run.name}"].data


def test_an_active_flow_run_reports_the_end_of_its_run_itself(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    mine = in_state(Running())
    run = unreported(dstack, mine, f"r-{uuid4().hex[:8]}")
    assert reap(credentials, min_age=0) == []
    assert artifacts_of(mine.id)[f"dstack-{run.name}-progress"].data < 100.0


def test_a_dry_run_reports_nothing(dstack: LocalServer, credentials: DstackCredentials) -> None:
    mine = in_state(Crashed())
    run = unreported(dstack, mine, f"r-{uuid4().hex[:8]}")
    assert reap(credentials, min_age=0, dry_run=True) == []
    assert artifacts_of(mine.id)[f"dstack-{run.name}-progress"].data < 100.0


def test_the_reaper_reports_what_it_stops(dstack: LocalServer, credentials: DstackCredentials) -> None:
    mine = in_state(Crashed())
    left = run_of(dstack, mine.id)
    (finding,) = reap(credentials, min_age=0)
    assert finding["stopped"]
    assert outcome_of(left).reason == "stopped_by_user"
    until(lambda: len(event_names(left.id)) == 2, seconds=30)
    assert event_names(left.id) == ["dstack.run.stopping", "dstack.run.terminated"]
    assert events_of(left.id)[0]["payload"] == {"url": left.url, "flow_run_id": str(mine.id)}


def test_a_refused_stop_is_in_the_finding(dstack: LocalServer, credentials: DstackCredentials) -> None:
    run_of(dstack, in_state(Crashed()).id)
    dstack.faults.add("/runs/stop", status=403, times=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reaper, "_END_SECONDS", 3.0)
        (finding,) = reap(credentials, min_age=0)
    assert finding["reason"].startswith("its flow run has ended; the server refused the stop: ")


def command(server: LocalServer, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "DSTACK_SERVER_URL": server.url,
        "DSTACK_PROJECT": server.project,
        "DSTACK_TOKEN": server.token,
        "COLUMNS": "200",
        **changes,
    }
    return subprocess.run(
        [sys.executable, "-m", "prefect_dstack", "reap", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_command_shows_what_it_did(dstack: LocalServer) -> None:
    left = run_of(dstack, in_state(Crashed()).id)
    shown = command(dstack, "--min-age", "0", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert f"Would stop: run {left.name} ({left.url}) of flow_run/" in shown.stdout
    assert not is_stopped(left)
    shown = command(dstack, "--min-age", "0")
    assert shown.returncode == 0, shown.stderr
    assert f"Stopped: run {left.name} ({left.url}) of flow_run/" in shown.stdout
    assert re.fullmatch(
        r"\d+ runs? of Prefect flows and tasks: .*1 stopped.*\.", shown.stdout.splitlines()[-1]
    )
    assert is_stopped(left)
    # The process has ended: its event was sent before.
    until(lambda: "dstack.run.terminated" in event_names(left.id), seconds=30)
    assert dstack.token not in shown.stdout + shown.stderr


def test_the_command_prints_an_error_without_a_traceback(dstack: LocalServer) -> None:
    dstack.faults.add("/runs/list", status=403, times=None)
    shown = command(dstack)
    assert shown.returncode == 1
    assert "Traceback" not in shown.stderr
    assert shown.stderr.strip()


def test_the_command_shows_what_it_could_not_stop(dstack: LocalServer) -> None:
    left = run_of(dstack, in_state(Crashed()).id)
    dstack.faults.add("/runs/stop", status=403, times=None, body={"detail": {"msg": "Access denied"}})
    shown = command(dstack, "--min-age", "0")
    dstack.faults.clear()
    assert shown.returncode == 1
    assert f"Not stopped: run {left.name} ({left.url}) of flow_run/" in shown.stdout


def test_the_command_needs_a_project_and_a_prefect_server_that_exist(dstack: LocalServer) -> None:
    shown = command(dstack, DSTACK_PROJECT="nowhere")
    assert (shown.returncode, "has no project 'nowhere'" in shown.stderr) == (1, True), shown.stderr
    shown = command(dstack, PREFECT_API_URL="")
    assert shown.returncode == 1
    assert shown.stderr == "PREFECT_API_URL: expected the address of your Prefect server, got none.\n"
    shown = command(dstack, "--min-age", "-1")
    assert (shown.returncode, "min_age: expected 0 seconds or more" in shown.stderr) == (1, True), (
        shown.stderr
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"min_age": "1m"}, r"^min_age: expected 0 seconds or more, got '1m'\."),
        ({"min_age": -1}, r"^min_age: expected 0 seconds or more, got -1\."),
        ({"min_age": float("nan")}, r"^min_age: expected 0 seconds or more, got nan\."),
        ({"dry_run": "no"}, r"^dry_run: expected True or False, got 'no'\."),
        ({"stop_unknown": 1}, r"^stop_unknown: expected True or False, got 1\."),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_read(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        reap("no-such-block", **given)


def test_a_killed_task_without_a_flow_is_reaped_once_it_is_set_to_crashed(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with get_client(sync_client=True) as client:
        owner = client.create_task_run(run_task, None, dynamic_key="0", state=Running())
        left = run_of(dstack, owner.id, kind="task_run")
        (finding,) = reap(credentials, min_age=0)
        assert (finding["owner"], finding["reason"]) == (f"task_run/{owner.id}", "its task run has not ended")
        client.set_task_run_state(owner.id, Crashed(), force=True)
    assert names(reap(credentials, min_age=0)) == {left.name}
    assert is_stopped(left)
