"""``fallbacks``: a task moves to other machines within one execution, by runs of which one at most is alive."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import cloudpickle  # type: ignore[import-untyped]
import pytest
from prefect import flow
from prefect.runtime import flow_run
from pydantic import SecretStr, ValidationError

from dstack_core import ConfigurationError, RunFailedError, RunInterruptedError, RunStoppedError
from dstack_core.integration import AttemptNames, split_step
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    DstackRun,
    _cancellation,
    arun_task,
    asubmit_run,
    deploy_service,
    dstack_task,
    run_task,
    submit_run,
)
from prefect_dstack._end_reports import flow_run_of
from prefect_dstack._names import outlives_crash, owner_of
from prefect_dstack._secrets import GitLogin
from prefect_dstack._submission import resolve

from .support import (
    all_runs,
    artifacts_of,
    cancelled_when,
    event_names,
    log_records,
    outcome_of,
    submissions,
    task_states,
    until,
)

# 0.6 s with lines, then half a second without.
WORK = "for i in 1 2 3; do echo step-$i; sleep 0.2; done; sleep 0.5; echo end"
TASK = {"type": "task", "commands": [WORK]}
LONG = {"type": "task", "commands": ["echo began; sleep 60"]}
LADDER: dict[str, Any] = {"spot_policy": "spot", "fallbacks": [{"spot_policy": "on-demand"}]}
FAST: dict[str, Any] = {"poll_interval": 0.2}
with_prefect = pytest.mark.usefixtures("prefect_server")


@flow
def sync_flow(configuration: Any, credentials: DstackCredentials, **options: Any) -> Any:
    return run_task(configuration, credentials, **{**FAST, **options})


@flow
async def async_flow(configuration: Any, credentials: DstackCredentials, **options: Any) -> Any:
    return await arun_task(configuration, credentials, **{**FAST, **options})


FLOWS = pytest.mark.parametrize("called", [sync_flow, async_flow], ids=["sync", "async"])


def state_of_call(called: Any, *args: Any, **options: Any) -> Any:
    state = called(*args, return_state=True, **options)
    return asyncio.run(state) if asyncio.iscoroutine(state) else state


def interrupt(dstack: LocalServer) -> None:
    dstack.scenarios.interrupt_after(0.8, noticed_after=0)


def plain() -> int:
    return 1


def credentials_of(server: LocalServer) -> DstackCredentials:
    return DstackCredentials(
        server_url=server.url, project_name=server.project, user_token=SecretStr(server.token)
    )


def names(dstack: LocalServer) -> list[str]:
    return [run.name for run in dstack.runs]


def is_step_running(dstack: LocalServer, number: int) -> bool:
    return any(run.name.endswith(f"-s{number}") and run.raw_status == "running" for run in all_runs(dstack))


@with_prefect
@FLOWS
def test_after_an_interruption_a_task_moves_to_on_demand(
    called: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    interrupt(dstack)
    state = state_of_call(called, TASK, credentials, **LADDER)
    outcome = state.result()
    first, second = dstack.runs
    assert second.name == f"{first.name}-s2"
    assert second.marker == f"{first.marker}/step2"
    assert [run.configuration["spot_policy"] for run in (first, second)] == ["spot", "on-demand"]
    assert (outcome["run_name"], outcome["status"]) == (second.name, "done")
    assert [(one["number"], one["reason"]) for one in outcome["attempts"]] == [
        (1, "interrupted_by_no_capacity"),
        (2, "done_by_runner"),
    ]
    runs = all_runs(dstack)
    assert outcome["cost"] == pytest.approx(sum(run.cost for run in runs), abs=1e-5)
    records = log_records(state.state_details.flow_run_id, last=f"Run {second.name} finished")
    text = "\n".join(str(record) for record in records)
    assert re.findall(r"step-\d|end$", text, re.M) == [*first.log, *second.log]
    assert f"Step 2 of 2: run {second.name} with spot_policy=on-demand." in records
    assert text.index("step-3") < text.index(f"Run {first.name} failed") < text.index("Step 2 of 2")
    # The events of the first run end with its start: what ended is not the task.
    until(lambda: len(event_names(runs[1].id)) == 2)
    assert event_names(runs[0].id) == ["dstack.run.started"]
    assert event_names(runs[1].id) == ["dstack.run.started", "dstack.run.done"]
    shown = artifacts_of(state.state_details.flow_run_id)
    progress = [item for key, item in shown.items() if key.endswith("-progress")]
    assert [item.data for item in progress] == [100]
    assert [item for item in shown.values() if item.description == f"Run {second.name}"]


@with_prefect
def test_without_capacity_a_task_moves_and_an_exit_status_leads_on(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    work = {"type": "task", "commands": ['test "$DSTACK_RUN_NAME" = train-s3 || exit 137']}
    fallbacks = [{"max_price": 5.0}, {"max_price": 6.0}]
    options = {"run_name": "train", "fallbacks": fallbacks, "fallback_on_exit": {"137": "next"}}
    # No machine is as cheap as that.
    outcome = state_of_call(sync_flow, work, credentials, max_price=0.0001, **options).result()
    assert names(dstack) == ["train", "train-s2", "train-s3"]
    assert outcome["run_name"] == "train-s3"
    assert [one["exit_status"] for one in outcome["attempts"]] == [137, 0]


@with_prefect
def test_a_success_and_a_failure_of_its_own_submit_nothing_more(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    assert state_of_call(sync_flow, TASK, credentials, **LADDER).result()["status"] == "done"
    assert len(dstack.runs) == 1
    failing = {"type": "task", "commands": ["exit 3"]}
    with pytest.raises(RunFailedError, match="status 3"):
        state_of_call(sync_flow, failing, credentials, **LADDER).result()
    assert len(dstack.runs) == 2


@with_prefect
def test_the_last_step_ends_the_task_and_its_retry_begins_at_the_first(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    dstack.scenarios.interrupt_after(0.3, times=2, noticed_after=0)

    @flow
    def retried(retries: int) -> Any:
        task = run_task.with_options(retries=retries, retry_delay_seconds=0)
        return task(TASK, credentials, **FAST, spot_policy="spot", fallbacks=[{"max_price": 5.0}])

    outcome: Any = retried(1)
    assert outcome["attempts"][-1]["number"] == 1
    first = dstack.runs[0].name
    assert names(dstack) == [first, f"{first}-s2", f"{first}-2"]
    dstack.scenarios.interrupt_after(0.3, times=2, noticed_after=0)
    with pytest.raises(RunInterruptedError):
        retried(0)


@with_prefect
def test_max_cost_that_pays_for_no_further_step_ends_the_task() -> None:
    prices = {"aws/us-east-1": 1.2, "gcp/us-west1": 3600.0}
    with LocalServer(regions=prices, step_seconds=0.02) as server:
        block = credentials_of(server)
        options = {"backends": ["aws"], "max_cost": 1.0, "fallbacks": [{"backends": ["gcp"]}]}
        options["fallback_on_exit"] = {137: "next"}
        failing = {"type": "task", "commands": ["exit 137"]}
        with pytest.raises(RunFailedError, match="no further step: max_cost: expected more than"):
            state_of_call(sync_flow, failing, block, **options).result()
        assert len(server.runs) == 1


@with_prefect
@pytest.mark.parametrize("lost", ["in step 2", "between", "after the end"])
def test_another_execution_continues_with_the_newest_step(
    lost: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    """The first execution no longer reaches the server, or fails later; the next one is another task run."""
    interrupt(dstack)
    entered: list[str] = []

    @flow(retries=1, retry_delay_seconds=0)
    def executed() -> Any:
        entered.append("")
        if len(entered) == 2:
            dstack.faults.clear()
        outcome = run_task(TASK, credentials, retry_budget=0.3, **FAST, **LADDER)
        if lost == "after the end" and len(entered) == 1:
            raise RuntimeError("something else failed")
        return outcome

    def break_the_line() -> None:
        if lost == "between":
            until(lambda: submissions(dstack) == 1)
            dstack.faults.add("/runs/apply", status=503, times=None)
        elif lost == "in step 2":
            until(lambda: is_step_running(dstack, 2))
            dstack.faults.add("/runs/get", status=503, times=None)

    breaker = threading.Thread(target=break_the_line)
    breaker.start()
    state = state_of_call(executed)
    breaker.join()
    assert len(entered) == 2
    _, second = dstack.runs
    assert state.result()["run_name"] == second.name
    assert [one["number"] for one in state.result()["attempts"]] == [1, 2]
    assert state.result()["cost"] == pytest.approx(sum(run.cost for run in all_runs(dstack)), abs=1e-5)
    text = "\n".join(map(str, log_records(state.state_details.flow_run_id, last=f"{second.name} finished")))
    # The log of the run that had ended is not relayed again.
    assert len(re.findall(r"^step-3", text, re.M)) == 1


@with_prefect
@pytest.mark.parametrize("task", [run_task, arun_task])
@pytest.mark.parametrize("moment", ["in step 2", "between", "in the submission"])
def test_a_cancellation_leaves_no_step_running(
    moment: str,
    task: Any,
    dstack: LocalServer,
    credentials: DstackCredentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 1.0)
    interrupt(dstack)
    ids: list[UUID] = []
    conditions: dict[str, Callable[[], bool]] = {
        "in step 2": lambda: is_step_running(dstack, 2),
        "between": lambda: any(run.raw_status == "failed" for run in all_runs(dstack)),
        "in the submission": lambda: submissions(dstack) == 2,
    }
    if moment == "in the submission":
        dstack.faults.add("/runs/apply", delay=1.5, times=2)
    # Longer pauses between the steps: the end is seen after the cancellation.
    pause = {"poll_interval": 3.0 if moment == "between" else 0.2}

    @flow
    def cancelled() -> None:
        ids.append(UUID(flow_run.get_id()))
        task.submit(LONG, credentials, **LADDER, **pause).wait()

    with cancelled_when(conditions[moment], ids):
        cancelled(return_state=True)
    until(lambda: task_states(ids[0]) == ["CANCELLED"], seconds=30)
    runs = all_runs(dstack)
    assert len(runs) == (1 if moment == "between" else 2)
    assert all(run.status().is_finished for run in runs)
    if moment != "between":
        assert outcome_of(runs[1]).reason == "stopped_by_user"


@with_prefect
@FLOWS
def test_an_interrupt_while_the_next_step_is_submitted_stops_it(
    called: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    interrupt(dstack)
    dstack.faults.add("/runs/apply", delay=1.5, times=2)

    def press() -> None:
        until(lambda: submissions(dstack) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        state_of_call(called, LONG, credentials, **LADDER)
    thread.join()
    until(lambda: len(dstack.runs) == 2 and all(run.finished for run in dstack.runs))


@with_prefect
def test_a_function_falls_back_and_returns_its_value(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @dstack_task(
        credentials=credentials,
        poll_interval=0.2,
        fallbacks=[{"max_price": 5.0}],
        fallback_on_exit={9: "next"},
    )
    def grown(size: int) -> int:
        import os
        import sys

        if not os.environ["DSTACK_RUN_NAME"].endswith("-s2"):
            sys.exit(9)
        return size + 1

    @flow
    def training() -> int:
        return grown(1)

    assert training() == 2
    assert len(dstack.runs) == 2


@with_prefect
@pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
def test_a_block_falls_back_while_it_is_waited_for(
    twin: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    interrupt(dstack)
    block = DstackRun(credentials=credentials, configuration=TASK, poll_interval=0.2, **LADDER)
    handle = block.trigger()
    copy = cloudpickle.loads(cloudpickle.dumps(handle))
    until(lambda: dstack.runs[0].finished)
    with pytest.raises(RuntimeError, match="has not ended"):
        handle.fetch_result()
    if twin:
        asyncio.run(handle.await_for_completion())
    else:
        handle.wait_for_completion()
    first, second = dstack.runs
    assert (first.name, handle.run_name) == (second.name.removesuffix("-s2"), second.name)
    outcome = handle.fetch_result()
    assert [one["number"] for one in outcome["attempts"]] == [1, 2]
    # Another process has the first run's name alone.
    fetched = asyncio.run(copy.afetch_result()) if twin else copy.fetch_result()
    assert fetched == outcome


@with_prefect
@pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
def test_a_handle_stops_the_newest_step(
    twin: bool, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    interrupt(dstack)
    handle = DstackRun(credentials=credentials, configuration=LONG, poll_interval=0.2, **LADDER).trigger()
    copy = cloudpickle.loads(cloudpickle.dumps(handle))

    def stop() -> None:
        until(lambda: is_step_running(dstack, 2))
        if twin:
            asyncio.run(copy.astop())
        else:
            copy.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(RunStoppedError):
        handle.wait_for_completion()
    thread.join()
    assert [run.finished for run in dstack.runs] == [True, True]


def test_the_markers_of_steps_are_those_of_their_flow_run() -> None:
    marker = "prefect:flow_run/0198/keep/3b0f92-0/2/step2"
    assert owner_of(marker) == ("flow_run", "0198")
    assert flow_run_of(marker) == "0198"
    assert outlives_crash(marker)
    names = AttemptNames("train", "prefect:flow_run/0198/keep/3b0f92-0")
    assert names.number_of(split_step(marker)[0]) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fallbacks": [{"env": {}}]}, r"^fallbacks\[0\]: expected .*got 'env'"),
        ({"fallbacks": {"spot_policy": "spot"}}, r"^fallbacks: expected a list of dicts"),
        ({"fallback_on_exit": {137: "next"}}, r"^fallback_on_exit: expected fallbacks with it"),
        ({**LADDER, "fallback_on_exit": {137: 3}}, r"^fallback_on_exit: expected .* 2 to 2"),
    ],
)
def test_wrong_fallbacks_are_one_error_wherever_they_are_given(
    options: dict[str, Any], text: str, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        resolve(TASK, options, GitLogin())
    with pytest.raises(ConfigurationError, match=text):
        dstack_task(**options)(plain)
    # Of a value of another type pydantic itself reports the field.
    with pytest.raises(ValidationError, match=rf"{text.removeprefix('^')}|fallbacks\n  Input should"):
        DstackRun(credentials=credentials, configuration=TASK, **options)


@with_prefect
@FLOWS
def test_a_wrong_value_of_a_later_step_is_an_error_before_anything_is_submitted(
    called: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match=r"^fallbacks\[0\]: spot_policy: expected"):
        state_of_call(called, TASK, credentials, fallbacks=[{"spot_policy": "cheap"}]).result()
    assert dstack.runs == []
    # A function is checked where it is decorated.
    with pytest.raises(ConfigurationError, match=r"^fallbacks\[0\]: max_duration: expected"):
        dstack_task(fallbacks=[{"max_duration": "2x"}])(plain)


@with_prefect
def test_what_follows_no_run_and_services_refuse_fallbacks(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    service = {"type": "service", "commands": ["sleep 60"], "port": 80}
    on_demand = LADDER["fallbacks"]

    @flow
    def refused(call: Any, configuration: Any) -> Any:
        found = call(configuration, credentials, fallbacks=on_demand)
        return asyncio.run(found) if asyncio.iscoroutine(found) else found

    submitting: list[Any] = [submit_run, asubmit_run]
    for call in submitting:
        with pytest.raises(ConfigurationError, match=r"^fallbacks: expected a task that follows its run"):
            state_of_call(refused, call, TASK).result()
    serving: list[Any] = [run_task, submit_run, deploy_service]
    for call in serving:
        with pytest.raises(ConfigurationError, match=r"^fallbacks: .*got that of a service"):
            state_of_call(refused, call, service).result()
    assert dstack.runs == []
