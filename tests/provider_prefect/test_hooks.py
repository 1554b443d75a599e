"""The hooks: what they stop, and what they leave alone."""

from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Crashed

from dstack_core import Run, ServerUnreachableError, Task
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    _orphaned_runs,
    stop_dstack_runs,
    stop_runs_on_cancellation,
    stop_runs_on_crash,
)
from prefect_dstack._names import flow_run_marker_prefix
from prefect_dstack._report import Report, emit, update_progress

from .support import artifacts_of, event_names, events_of, outcome_of, until

pytestmark = pytest.mark.usefixtures("prefect_server")

LONG = Task(commands=["sleep 60"])


@flow
def idle() -> None:
    """Do nothing; hooks need the flow of a flow run."""


@pytest.fixture(autouse=True)
def _one_quick_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_orphaned_runs, "_PAUSE", 0.2)


def flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.create_flow_run(idle)


def run_for(server: LocalServer, owner: FlowRun, name: str, on_crash: str = "stop") -> Run:
    with server.client() as client:
        return client.runs.submit(
            LONG, run_name=name, marker=f"{flow_run_marker_prefix(str(owner.id))}{on_crash}/abc-0/1"
        )


def is_stopped(run: Run) -> bool:
    return run.status().is_stopping or run.outcome() is not None


def test_the_runs_of_a_cancelled_flow_run_are_stopped_and_no_others(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    mine, other = flow_run(), flow_run()
    owned = [run_for(dstack, mine, "first"), run_for(dstack, mine, "second", on_crash="keep")]
    foreign = run_for(dstack, other, "foreign")
    hook = stop_dstack_runs(credentials)
    hook(idle, mine, Cancelling())
    assert all(is_stopped(run) for run in owned)
    assert not is_stopped(foreign)
    hook(idle, mine, Cancelling())


def test_a_crash_leaves_what_is_to_be_kept(dstack: LocalServer, credentials: DstackCredentials) -> None:
    mine = flow_run()
    stopped, kept = run_for(dstack, mine, "stopped"), run_for(dstack, mine, "kept", on_crash="keep")
    stop_dstack_runs(credentials)(idle, mine, Crashed())
    assert is_stopped(stopped)
    assert not is_stopped(kept)


def test_a_run_that_appears_late_is_stopped_too(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, late = flow_run(), []
    pause = SimpleNamespace(time=time.time, sleep=lambda _: late.append(run_for(dstack, mine, "late")))
    monkeypatch.setattr(_orphaned_runs, "time", pause)
    stop_dstack_runs(credentials)(idle, mine, Crashed())
    assert is_stopped(late[0])


@pytest.mark.parametrize("hook", [stop_runs_on_cancellation, stop_runs_on_crash, stop_dstack_runs()])
def test_the_environment_names_the_server(
    hook: Any, dstack: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SERVER_URL", dstack.url), ("PROJECT", dstack.project), ("TOKEN", dstack.token)):
        monkeypatch.setenv(f"DSTACK_{name}", value)
    mine = flow_run()
    run = run_for(dstack, mine, "mine")
    hook(idle, mine, Cancelling())
    assert is_stopped(run)


def test_a_hook_loads_a_saved_block_when_it_runs_and_also_inside_an_event_loop(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    hook = stop_dstack_runs("block-of-the-hook")
    credentials.save("block-of-the-hook", overwrite=True)
    mine = flow_run()
    run = run_for(dstack, mine, "mine")

    async def in_a_loop() -> None:
        hook(idle, mine, Cancelling())

    asyncio.run(in_a_loop())
    assert is_stopped(run)


def test_a_hook_survives_pickling_without_showing_the_token(credentials: DstackCredentials) -> None:
    hook = stop_dstack_runs(credentials)
    copy = cloudpickle.loads(cloudpickle.dumps(hook))
    assert copy.keywords == hook.keywords  # type: ignore[attr-defined]
    assert credentials.user_token.get_secret_value() not in repr(hook)


def test_hooks_fit_the_flow_decorator() -> None:
    hook = stop_dstack_runs()
    decorated = flow(
        on_cancellation=[hook, stop_runs_on_cancellation], on_crashed=[hook, stop_runs_on_crash]
    )(idle.fn)
    assert len(decorated.on_cancellation_hooks) == len(decorated.on_crashed_hooks) == 2


def test_an_unreachable_server_is_reported(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = flow_run()
    run_for(dstack, mine, "mine")
    monkeypatch.setattr(_orphaned_runs, "_LIST_BUDGET", 0.3)
    dstack.faults.add("/runs/list", status=503, times=None)
    with pytest.raises(ServerUnreachableError):
        stop_dstack_runs(credentials)(idle, mine, Crashed())


def started_report(server: LocalServer, owner: FlowRun, name: str, *, stopped: bool = False) -> Run:
    """Leave a run as a killed process does: shown as running, its end not reported."""
    run = run_for(server, owner, name)
    report = Report(name, logging.getLogger("killed"), artifacts=True, flow_run_id=owner.id)
    report.start(run)
    if stopped:
        run.stop(until="ended")
    return run


def check_reported_once(owner: FlowRun, run: Run, name: str) -> None:
    until(lambda: "dstack.run.terminated" in event_names(run.id), seconds=30, what="the event of the end")
    # The server stores events every five seconds; a second event would be stored before the probe.
    emit("probe", run.name, run.id, {})
    until(lambda: "dstack.run.probe" in event_names(run.id), seconds=30)
    assert event_names(run.id).count("dstack.run.terminated") == 1
    found = artifacts_of(owner.id)
    assert found[f"dstack-{name}-progress"].data == 100.0
    assert found[f"dstack-{name}-progress"].description == f"Run {run.name}: terminated"
    assert "terminated" in found[f"dstack-{name}"].data


@pytest.mark.parametrize("state", [Cancelling, Crashed])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_end_of_a_run_is_reported_once_for_a_process_that_was_killed(
    stopped: bool,
    state: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    mine = flow_run()
    run = started_report(dstack, mine, "mine", stopped=stopped)
    stop_dstack_runs(credentials)(idle, mine, state())
    assert outcome_of(run).reason == "stopped_by_user"
    (reported,) = [message for message in caplog.messages if "Reported the end" in message]
    assert f": Run {run.name} was stopped on request, " in reported
    assert reported.endswith(run.url)
    until(lambda: "dstack.run.terminated" in event_names(run.id), seconds=30)
    caplog.clear()
    stop_dstack_runs(credentials)(idle, mine, state())
    assert "Reported the end" not in caplog.text
    check_reported_once(mine, run, "mine")
    (ended,) = [event for event in events_of(run.id) if event["event"] == "dstack.run.terminated"]
    assert ended["related"][0]["prefect.resource.id"] == f"prefect.flow-run.{mine.id}"
    assert ended["payload"]["reason"] == "stopped_by_user"


def test_a_report_that_was_cut_off_before_its_progress_makes_no_second_table(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    mine = flow_run()
    run = started_report(dstack, mine, "mine", stopped=True)
    stop_dstack_runs(credentials)(idle, mine, Crashed())
    with get_client(sync_client=True) as api:
        progress = artifacts_of(mine.id)["dstack-mine-progress"]
        update_progress(api, progress.id, run.name, "running", 50.0)
        stop_dstack_runs(credentials)(idle, mine, Crashed())
        chosen = ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[mine.id]), key=ArtifactFilterKey(any_=["dstack-mine"])
        )
        assert len(api.read_artifacts(artifact_filter=chosen)) == 1
    check_reported_once(mine, run, "mine")


def test_a_run_that_is_kept_does_not_delay_the_hook(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    mine = flow_run()
    run = run_for(dstack, mine, "kept", on_crash="keep")
    Report("kept", logging.getLogger("killed"), artifacts=True, flow_run_id=mine.id).start(run)
    started = time.monotonic()
    stop_dstack_runs(credentials)(idle, mine, Crashed())
    assert time.monotonic() - started < 30
    assert artifacts_of(mine.id)["dstack-kept-progress"].data < 100.0
    assert not is_stopped(run)


def test_a_stop_that_the_server_drops_is_repeated(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    mine = flow_run()
    run = run_for(dstack, mine, "mine")
    until(lambda: run.status() == "running")
    dstack.faults.add("/runs/stop", times=1, status=200, body="null")
    stop_dstack_runs(credentials)(idle, mine, Crashed())
    assert outcome_of(run).reason == "stopped_by_user"


def test_a_refused_stop_is_logged_with_what_to_do(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    mine = flow_run()
    run = run_for(dstack, mine, "mine")
    dstack.faults.add("/runs/stop", status=403, times=None)
    started = time.monotonic()
    stop_dstack_runs(credentials)(idle, mine, Crashed())
    assert time.monotonic() - started < 30
    assert f"Stopping run mine (the flow run crashed): {run.url}" in caplog.text
    assert "refused to stop run mine" in caplog.text
    assert caplog.text.count("Ask an admin of the project") == 1
    assert "Ask somebody" not in caplog.text
    assert not is_stopped(run)


def test_runs_of_subflows_belong_to_their_parents(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    runs: list[Run] = []
    parents: list[FlowRun] = []

    @flow
    def child() -> None:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        runs.append(run_for(dstack, context.flow_run, "child"))

    @flow
    def parent() -> None:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        parents.append(context.flow_run)
        child()

    parent()
    stop_dstack_runs(credentials)(parent, parents[0], Crashed())
    until(lambda: is_stopped(runs[0]), seconds=10)
