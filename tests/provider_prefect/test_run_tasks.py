"""The tasks for single steps: submit, get, wait, stop; and the flow that does all of it."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any, get_type_hints
from uuid import UUID

import pytest
from prefect import flow, unmapped
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelling
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import TypeAdapter

import prefect_dstack
from dstack_core import (
    ConfigurationError,
    RunNotFoundError,
    RunStatus,
    RunStoppedError,
)
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    RunDict,
    _cancellation,
    aget_run,
    arun_and_report,
    astop_run,
    asubmit_run,
    await_for_run,
    await_for_service,
    get_run,
    run_and_report,
    stop_run,
    submit_run,
    wait_for_run,
    wait_for_service,
)
from prefect_dstack.flows import stop_own_runs

from .support import (
    all_runs,
    cancelled_when,
    interrupt_when_asked,
    is_running,
    log_records,
    outcome_of,
    submissions,
    the_run,
    until,
)

pytestmark = pytest.mark.usefixtures("prefect_server")

LONG = {"type": "task", "commands": ["echo started; sleep 60"]}
SHORT = {"type": "task", "commands": ["echo the-end"]}
FAST: dict[str, Any] = {"poll_interval": 0.1}


@pytest.mark.parametrize("name", ["run_task", "submit_run", "get_run", "stop_run", "run_and_report"])
def test_the_twins_have_equal_parameters(name: str) -> None:
    sync, twin = (getattr(prefect_dstack, found).fn for found in (name, f"a{name}"))
    assert inspect.signature(sync).parameters == inspect.signature(twin).parameters
    assert inspect.iscoroutinefunction(twin)
    assert not inspect.iscoroutinefunction(sync)


@pytest.mark.parametrize(
    ("sync", "twin"), [(wait_for_run, await_for_run), (wait_for_service, await_for_service)]
)
def test_waiting_has_twins_too(sync: Any, twin: Any) -> None:
    assert inspect.signature(sync.fn).parameters == inspect.signature(twin.fn).parameters


def test_step_by_step(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def steps() -> tuple[Any, ...]:
        submitted = submit_run(SHORT, credentials)
        outcome = wait_for_run(submitted, credentials, **FAST)
        return flow_run.id, submitted, outcome, get_run(submitted["run_name"], credentials)

    flow_run_id, submitted, outcome, seen = steps()
    run = the_run(dstack)
    for each in (submitted, seen):
        assert TypeAdapter(RunDict).validate_python(each, strict=True) == each
        assert set(get_type_hints(RunDict)) >= set(each) >= RunDict.__required_keys__
    assert set(submitted) == set(get_type_hints(RunDict))
    assert (submitted["run_id"], submitted["url"], submitted["marker"]) == (run.id, run.url, run.marker)
    assert outcome == seen["outcome"] == outcome_of(run).to_dict()
    assert seen["status"] == "done"
    assert sum("the-end" in message for message in log_records(flow_run_id, last="the-end")) == 1


def test_step_by_step_in_an_async_flow(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    async def steps() -> tuple[Any, ...]:
        submitted = await asubmit_run(LONG, credentials)
        stopped = await astop_run(submitted, credentials)
        with pytest.raises(RunStoppedError):
            await await_for_run(submitted, credentials, **FAST)
        return stopped, await aget_run(submitted, credentials), await aget_run("no-such-run", credentials)

    stopped, seen, nothing = asyncio.run(steps())
    assert RunStatus(stopped["status"]).is_stopping or stopped["outcome"]
    assert seen["outcome"]["reason"] == outcome_of(the_run(dstack)).reason == "stopped_by_user"
    assert nothing is None


def test_stopping_an_ended_or_missing_run_is_not_an_error(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def steps() -> tuple[Any, ...]:
        done = submit_run(SHORT, credentials)
        wait_for_run(done, credentials, **FAST)
        return stop_run(done, credentials), stop_run("no-such-run", credentials, abort=True)

    over, nothing = steps()
    assert (over["status"], nothing) == ("done", None)
    assert not any(request.path.endswith("/runs/stop") for request in dstack.requests)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_mask_env_that_no_variable_of_the_run_has_is_refused(
    dstack: LocalServer, credentials: DstackCredentials, kind: str
) -> None:
    task = {**SHORT, "env": {"LICENSE": "lic12345"}}
    with dstack.client() as client:
        client.runs.submit(task, "licensed")

    @flow
    def steps(name: str) -> Any:
        options: Any = {**FAST, "mask_env": [name]}
        return wait_for_run("licensed", credentials, **options)

    @flow
    async def asteps(name: str) -> Any:
        options: Any = {**FAST, "mask_env": [name]}
        return await await_for_run("licensed", credentials, **options)

    def call(name: str) -> Any:
        return steps(name) if kind == "sync" else asyncio.run(asteps(name))

    with pytest.raises(
        ConfigurationError, match=r"mask_env: .*\(LICENSE.*'LICENCE'\. Did you mean 'LICENSE'"
    ):
        call("LICENCE")
    assert call("LICENSE")["status"] == "done"


@pytest.mark.parametrize("wrong", ["", {}, {"run_name": 3}, None])
def test_an_argument_without_a_runs_name_is_refused(wrong: Any, credentials: DstackCredentials) -> None:
    @flow
    def steps() -> None:
        wait_for_run(wrong, credentials)

    with pytest.raises(ConfigurationError, match="expected a run's name"):
        steps()


def test_a_later_run_of_the_same_name_is_another_run(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def steps() -> Any:
        first = submit_run(SHORT, credentials, run_name="again")
        wait_for_run(first, credentials, **FAST)
        with dstack.client() as client:
            client.runs.submit(LONG, run_name="again")
        assert get_run(first, credentials) is None
        assert stop_run(first, credentials) is None
        wait_for_run(first, credentials, **FAST)

    with pytest.raises(RunNotFoundError, match="again"):
        steps()
    assert all_runs(dstack)[-1].outcome() is None


def test_mapped_over_a_small_pool(dstack: LocalServer, credentials: DstackCredentials) -> None:
    configurations = [{"type": "task", "commands": [f"echo {number}"]} for number in range(4)]

    pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=2)

    @flow(task_runner=pool)  # type: ignore[arg-type]
    def mapped() -> list[Any]:
        submitted = submit_run.map(configurations, credentials=unmapped(credentials))
        return list(wait_for_run.map(submitted, credentials=unmapped(credentials), **FAST).result())

    outcomes = mapped()
    assert [outcome["status"] for outcome in outcomes] == ["done"] * 4
    assert {outcome["run_id"] for outcome in outcomes} == {run.id for run in all_runs(dstack)}


@pytest.mark.parametrize(("own", "stops"), [(True, 1), (False, 0)])
def test_an_interrupt_stops_the_flow_runs_own_run_and_no_other(
    own: bool, stops: int, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def waiting() -> None:
        if own:
            submit_run(LONG, credentials, run_name="watched")
        else:
            with dstack.client() as client:
                client.runs.submit(LONG, run_name="watched")
        wait_for_run("watched", credentials, **FAST)

    thread = interrupt_when_asked(dstack)
    with pytest.raises(KeyboardInterrupt):
        waiting()
    thread.join()
    assert sum(request.path.endswith("/runs/stop") for request in dstack.requests) == stops
    assert (the_run(dstack).outcome() is not None) == own


def test_a_cancelled_flow_run_stops_the_run_it_waits_for_in_a_thread(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    ids: list[UUID] = []

    @flow
    def cancelled() -> None:
        ids.append(UUID(flow_run.get_id()))
        wait_for_run.submit(submit_run.submit(LONG, credentials), credentials, **FAST).wait()

    with cancelled_when(lambda: is_running(dstack), ids):
        cancelled(return_state=True)
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"


def test_an_unreachable_server_is_tolerated_before_the_first_poll(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    with dstack.client() as client:
        client.runs.submit(SHORT, run_name="there")
    fault = dstack.faults.add("/runs/get", status=503, times=None)

    def recover() -> None:
        until(lambda: "Retrying for" in caplog.text)
        fault.times = 1

    thread = threading.Thread(target=recover)
    thread.start()

    @flow
    def waiting() -> Any:
        return wait_for_run("there", credentials, retry_budget=60, **FAST)

    outcome: Any = waiting()
    assert outcome["status"] == "done"
    thread.join()


@pytest.mark.parametrize("twin", [False, True])
def test_the_flow_reports_what_it_ran(
    twin: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    credentials.save("reporter", overwrite=True)
    outcome = asyncio.run(arun_and_report(SHORT, "reporter")) if twin else run_and_report(SHORT, "reporter")
    assert outcome == outcome_of(the_run(dstack)).to_dict()
    assert submissions(dstack) == 1


def test_the_flows_own_hook_finds_the_server_by_its_parameter(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    credentials.save("of-the-flow", overwrite=True)
    with get_client(sync_client=True) as api:
        flow_run = api.create_flow_run(
            run_and_report, parameters={"configuration": LONG, "credentials": "of-the-flow"}
        )
    with dstack.client() as client:
        run = client.runs.submit(LONG, run_name="left", marker=f"prefect:flow_run/{flow_run.id}/stop/a-0/1")
    stop_own_runs(run_and_report, flow_run, Cancelling())
    assert run.status().is_stopping or run.outcome() is not None
