"""Fleets of flow runs: created, used by default, and deleted whatever ends the flow run."""

from __future__ import annotations

import asyncio
import contextvars
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from prefect import State, flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Running

import dstack_core as core
from dstack_core import Fleet
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    _cancellation,
    _orphaned_resources,
    _orphaned_runs,
    acreate_fleet,
    adelete_fleet,
    arun_task,
    asubmit_run,
    create_fleet,
    delete_fleet,
    dstack_fleet,
    run_task,
    stop_dstack_runs,
    submit_run,
)
from prefect_dstack.reaper import areap, describe, reap, summary

from .support import all_runs, cancelled_when, state_of, until

pytestmark = pytest.mark.usefixtures("prefect_server")

QUICK: dict[str, Any] = {"type": "task", "commands": ["true"]}
ELASTIC: dict[str, Any] = {"name": "warm", "nodes": "0..1"}
OPTIONS: dict[str, Any] = {"poll_interval": 0.1}


def fleets(server: LocalServer) -> dict[str, Fleet]:
    with server.client() as client:
        return {one.name: one for one in client.fleets.list() if not one.is_terminating}


def fleets_named(server: LocalServer) -> list[Any]:
    """Return what each run named as its fleets, oldest first."""
    named = [run.configuration.get("fleets") for run in server.runs]
    return [one if one is None else [fleet["name"] for fleet in one] for one in named]


def test_runs_inside_the_block_use_its_fleet_and_it_is_deleted(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    @flow(name="nightly")
    def nightly() -> str:
        with dstack_fleet(ELASTIC, credentials) as fleet:
            run_task(QUICK, credentials, **OPTIONS)
            assert (fleet.marker or "").startswith(f"prefect:flow_run/{flow_run.id}/fleet/")
            assert fleets(dstack)[fleet.name].marker == fleet.marker
            run_task.submit(QUICK, credentials, **OPTIONS).result()
            run_task({**QUICK, "fleets": ["other"]}, credentials, **OPTIONS)
        run_task(QUICK, credentials, **OPTIONS)
        return fleet.name

    name = nightly()
    assert name.startswith("nightly-warm-")
    assert fleets_named(dstack) == [[name], [name], ["other"], None]
    assert fleets(dstack) == {}
    assert f"Fleet {name} is being deleted." in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_the_block_waits_for_a_run_that_has_no_machine_yet(
    dstack: LocalServer, credentials: DstackCredentials, is_async: bool
) -> None:
    dstack.scenarios.capacity_after(3)

    def check(run: Any) -> None:
        (seen,) = [one for one in dstack.runs if one.name == run["run_name"]]
        assert seen.status == "done"
        assert fleets(dstack) == {}

    @flow
    def nightly() -> None:
        with dstack_fleet(ELASTIC, credentials):
            run = submit_run(QUICK, credentials, retry_policy=True)
        check(run)

    @flow
    async def anightly() -> None:
        async with dstack_fleet(ELASTIC, credentials):
            run = await asubmit_run(QUICK, credentials, retry_policy=True)
        check(run)

    asyncio.run(anightly()) if is_async else nightly()


def test_a_task_that_begins_after_its_block_submits_nothing(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    block_has_ended = threading.Event()

    @task
    def late() -> None:
        assert block_has_ended.wait(60)
        run_task(QUICK, credentials, **OPTIONS)

    @flow
    def nightly() -> str:
        with dstack_fleet(ELASTIC, credentials):
            future = late.submit()
        block_has_ended.set()
        with pytest.raises(core.ConfigurationError) as error:
            future.result()
        run_task(QUICK, credentials, **OPTIONS)
        return str(error.value)

    assert "Wait for the task inside of the block" in nightly()
    assert fleets_named(dstack) == [None]


def test_the_async_block_does_the_same(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    async def nightly() -> tuple[str, str]:
        async def one(label: str) -> str:
            async with dstack_fleet({**ELASTIC, "tags": {"part": label}}, credentials) as fleet:
                await arun_task(QUICK, credentials, **OPTIONS)
            return fleet.name

        first, second = await asyncio.gather(one("a"), one("b"))
        return first, second

    names = asyncio.run(nightly())
    assert sorted(fleets_named(dstack)) == sorted([name] for name in names)
    assert len(set(names)) == 2
    assert fleets(dstack) == {}


def test_outside_of_a_flow_a_fleet_is_refused(dstack: LocalServer, credentials: DstackCredentials) -> None:
    def enter() -> None:
        with dstack_fleet(ELASTIC, credentials):
            pytest.fail("must not be entered")

    async def aenter() -> None:
        async with dstack_fleet(ELASTIC, credentials):
            pytest.fail("must not be entered")

    @flow
    def in_a_thread() -> None:
        with ThreadPoolExecutor() as pool:
            pool.submit(enter).result()

    refused = r"^dstack_fleet: expected a flow or a task, got code outside of one.*copy_context"
    with pytest.raises(core.ConfigurationError, match=refused):
        enter()
    with pytest.raises(core.ConfigurationError, match=refused):
        asyncio.run(aenter())
    with pytest.raises(core.ConfigurationError, match=refused):
        in_a_thread()
    assert fleets(dstack) == {}


def test_a_thread_with_the_context_of_its_flow_has_a_fleet(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    def enter() -> tuple[str | None, list[Any]]:
        with dstack_fleet(ELASTIC, credentials) as fleet:
            run_task(QUICK, credentials, **OPTIONS)
            return fleet.marker, [fleet.name]

    @flow
    def in_a_thread() -> tuple[str | None, list[Any], Any]:
        with ThreadPoolExecutor() as pool:
            return *pool.submit(contextvars.copy_context().run, enter).result(), flow_run.id

    marker, name, owner = in_a_thread()
    assert (marker or "").startswith(f"prefect:flow_run/{owner}/fleet/")
    assert fleets_named(dstack) == [name]
    assert fleets(dstack) == {}


def test_an_exception_deletes_the_fleet(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def failing() -> None:
        with dstack_fleet(ELASTIC, credentials):
            assert len(fleets(dstack)) == 1
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        failing()
    assert fleets(dstack) == {}


def test_machines_are_waited_for(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def waiting() -> tuple[int, float]:
        with dstack_fleet({"nodes": 2}, credentials) as fleet:
            return sum(one.is_ready for one in fleet.instances), fleet.price_per_hour

    ready, price = waiting()
    assert ready == 2
    assert price > 0


def test_machines_that_do_not_come_are_an_error_and_leave_nothing(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    wanted = {"nodes": 1, "resources": {"gpu": "9000GB"}}

    @flow
    def waiting() -> None:
        with dstack_fleet(wanted, credentials, timeout=0.5):
            pytest.fail("must not be entered")

    with pytest.raises(
        core.WaitTimeoutError, match=r"did not have 1 ready machine within 0\.5 s\. I"
    ) as late:
        waiting()
    assert re.search(r"no offers|no_offers|pending", str(late.value))
    assert str(late.value).endswith("Ask for less or pay more, or wait longer.")
    assert fleets(dstack) == {}


def test_the_fleet_is_deleted_once_its_runs_have_ended(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def returning() -> None:
        with dstack_fleet(ELASTIC, credentials):
            submit_run({"type": "task", "commands": ["sleep 1"]}, credentials)
            until(lambda: all_runs(dstack)[0].raw_status == "running")

    returning()
    assert fleets(dstack) == {}
    (run,) = all_runs(dstack)
    until(lambda: run.refresh().outcome())
    assert run.outcome() is not None
    assert run.outcome().succeeded  # type: ignore[union-attr]


def test_a_fleet_that_cannot_be_deleted_is_logged_and_does_not_fail_the_flow(
    dstack: LocalServer, credentials: DstackCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    @flow
    def unlucky() -> str:
        with dstack_fleet(ELASTIC, credentials, delete_timeout=0.5) as fleet:
            dstack.faults.add("/fleets/delete", status=503, times=None)
            return fleet.name

    name = unlucky()
    assert f"Fleet {name} could not be deleted" in caplog.text
    # No hook runs after Completed.
    assert "reaper" in caplog.text
    assert "hooks" not in caplog.text


def test_a_name_of_another_owner_is_refused(dstack: LocalServer, credentials: DstackCredentials) -> None:
    with dstack.client() as client:
        client.fleets.apply({"nodes": "0..1"}, name="taken", marker="other")

    @flow
    def naming() -> None:
        with dstack_fleet(ELASTIC, credentials, name="taken"):
            pytest.fail("must not be entered")

    with pytest.raises(core.ResourceNameTakenError):
        naming()
    assert set(fleets(dstack)) == {"taken"}


def test_the_next_try_of_a_flow_finds_its_fleet(dstack: LocalServer, credentials: DstackCredentials) -> None:
    seen: list[str] = []

    @flow(retries=1)
    def retried() -> None:
        fleet = create_fleet(ELASTIC, credentials)
        seen.append(fleet["fleet_id"])
        if len(seen) == 1:
            raise ValueError("once")
        assert delete_fleet(fleet, credentials)
        assert not delete_fleet(fleet, credentials)

    retried()
    assert len(set(seen)) == 1
    assert fleets(dstack) == {}


def test_equal_fleets_of_one_flow_are_two(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def two() -> None:
        with dstack_fleet(ELASTIC, credentials) as first, dstack_fleet(ELASTIC, credentials) as second:
            assert first.name != second.name
            assert len(fleets(dstack)) == 2
        assert fleets(dstack) == {}
        with dstack_fleet(ELASTIC, credentials) as third:
            assert third.name not in (first.name, second.name)

    two()


def test_a_fleet_that_is_kept_has_no_owner(dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    async def keeping(nodes: str) -> dict[str, Any]:
        return await acreate_fleet({"name": "shared", "nodes": nodes}, credentials, keep=True)

    first = asyncio.run(keeping("0..1"))
    second = asyncio.run(keeping("0..2"))
    assert first["fleet_id"] == second["fleet_id"]
    assert first["marker"] == "prefect:fleet/shared"
    assert reap(credentials, min_age=0, stop_unknown=True) == []
    assert fleets(dstack)["shared"].configuration["nodes"]["max"] == 2

    @flow
    async def ending() -> bool:
        return await adelete_fleet("shared", credentials)

    assert asyncio.run(ending())
    assert fleets(dstack) == {}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"keep": True}, "name: expected one for a fleet with keep=True"),
        ({"keep": "no"}, "keep: expected True or False"),
        ({"timeout": 0}, "timeout: expected more than 0 seconds"),
        ({"name": "Not a name"}, "name: expected 2 to 41 lower-case"),
        ({"name": 3}, "name: expected the name of a fleet"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_created(
    given: dict[str, Any], text: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def wrong() -> None:
        create_fleet({"nodes": "0..1"}, credentials, **given)

    with pytest.raises(core.ConfigurationError, match=text):
        wrong()
    assert fleets(dstack) == {}


def test_a_wrong_fleet_to_delete_is_refused(credentials: DstackCredentials) -> None:
    @flow
    def wrong() -> None:
        delete_fleet({"id": 3}, credentials)

    with pytest.raises(
        core.ConfigurationError, match="fleet: expected a name, or what create_fleet returned"
    ):
        wrong()


def test_a_signal_deletes_the_fleet_before_the_process_is_killed(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    @flow
    def interrupted() -> None:
        # Prefect ends the process that a flow's signal comes out of.
        with pytest.raises(TerminationSignal), dstack_fleet(ELASTIC, credentials):
            raise TerminationSignal(signal.SIGTERM)

    interrupted()
    assert fleets(dstack) == {}


def test_a_cancelled_async_block_deletes_the_fleet(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    entered = threading.Event()

    @flow
    async def endless() -> None:
        async with dstack_fleet(ELASTIC, credentials):
            entered.set()
            await asyncio.sleep(60)

    async def main() -> None:
        running = asyncio.ensure_future(endless())
        await asyncio.to_thread(entered.wait)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert fleets(dstack) == {}


def test_a_cancellation_ends_the_wait_for_machines(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"nodes": 1, "resources": {"gpu": "9000GB"}}
    ids: list[UUID] = []

    @flow
    def waiting() -> None:
        ids.append(UUID(flow_run.id))
        create_fleet.submit(wanted, credentials).wait()

    monkeypatch.setattr(_cancellation, "CHECK_SECONDS", 0.3)
    with cancelled_when(lambda: fleets(dstack), ids):
        waiting(return_state=True)
    until(lambda: not fleets(dstack))
    assert state_of(ids[0]).is_cancelling() or state_of(ids[0]).is_final()


@flow
def idle() -> None:
    """Do nothing; a flow run needs a flow."""


def in_state(state: State[Any]) -> FlowRun:
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(idle)
        client.set_flow_run_state(run.id, state, force=True)
        return run


def fleet_of(server: LocalServer, owner: FlowRun, name: str = "left") -> None:
    with server.client() as client:
        client.fleets.apply({"nodes": "0..1"}, name=name, marker=f"prefect:flow_run/{owner.id}/fleet/abc-0/1")


def run_in(server: LocalServer, owner: FlowRun, on_crash: str = "stop") -> core.Run:
    with server.client() as client:
        return client.runs.submit(
            {"type": "task", "commands": ["sleep 60"], "fleets": ["left"]},
            run_name=f"run-{on_crash}",
            marker=f"prefect:flow_run/{owner.id}/{on_crash}/abc-0/1",
        )


@pytest.mark.parametrize("make", [Completed, Crashed, Cancelled])
def test_the_reaper_deletes_the_fleet_of_a_flow_run_that_has_ended(
    make: Callable[[], State[Any]], dstack: LocalServer, credentials: DstackCredentials
) -> None:
    owner = in_state(make())
    fleet_of(dstack, owner)
    (would,) = reap(credentials, min_age=0, dry_run=True)
    (left,) = fleets(dstack).values()
    page = f"{dstack.url}/projects/{dstack.project}/fleets/{left.id}"
    assert describe(would, dry_run=True).startswith(f"Would delete: fleet left ({page}) of flow_run/")
    assert set(fleets(dstack)) == {"left"}
    (finding,) = reap(credentials, min_age=0)
    assert finding["stopped"]
    assert summary([finding], dry_run=False) == "1 fleet of Prefect flows and tasks: 1 deleted."
    assert fleets(dstack) == {}


@pytest.mark.parametrize("make", [Crashed, Cancelled, Completed])
def test_a_task_run_of_a_killed_process_keeps_no_fleet(
    make: Callable[[], State[Any]], dstack: LocalServer, credentials: DstackCredentials
) -> None:
    owner = in_state(Running())
    fleet_of(dstack, owner)
    with get_client(sync_client=True) as client:
        client.create_task_run(run_task, owner.id, dynamic_key="0", state=Running())
        client.set_flow_run_state(owner.id, make(), force=True)
    (finding,) = reap(credentials, min_age=0)
    # A flow may return before its submitted tasks.
    assert finding["stopped"] == (make is not Completed), finding["reason"]
    assert bool(fleets(dstack)) == (make is Completed)


def test_the_reaper_leaves_fleets_that_are_needed_and_those_of_others(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    fleet_of(dstack, in_state(Running()))
    with dstack.client() as client:
        client.fleets.apply({"nodes": "0..1"}, name="by-hand")
        client.fleets.apply({"nodes": "0..1"}, name="by-airflow", marker="airflow:dag/run/task")
    (finding,) = asyncio.run(areap(credentials, min_age=0))
    assert (finding["kind"], finding["run_name"], finding["stopped"]) == ("fleet", "left", False)
    assert len(fleets(dstack)) == 3


def test_a_fleet_that_just_lost_its_flow_run_is_left(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    fleet_of(dstack, in_state(Crashed()))
    (finding,) = reap(credentials)
    assert "ended" in finding["reason"]
    assert set(fleets(dstack)) == {"left"}


def test_the_reaper_stops_the_runs_first(dstack: LocalServer, credentials: DstackCredentials) -> None:
    owner = in_state(Crashed())
    fleet_of(dstack, owner)
    run_in(dstack, owner)
    until(lambda: all_runs(dstack)[0].raw_status == "running")
    findings = reap(credentials, min_age=0)
    assert [(found["kind"], found["stopped"]) for found in findings] == [("run", True), ("fleet", True)]
    assert fleets(dstack) == {}


def test_the_reaper_leaves_the_fleet_of_a_run_that_is_kept(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    owner = in_state(Crashed())
    fleet_of(dstack, owner)
    run_in(dstack, owner, on_crash="keep")
    findings = reap(credentials, min_age=0)
    assert [found["stopped"] for found in findings] == [False, False]
    assert "run run-keep of its flow run is left" in findings[1]["reason"]
    assert set(fleets(dstack)) == {"left"}


def test_a_fleet_that_others_use_is_left_for_the_next_pass(
    dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_orphaned_resources, "_IN_USE_SECONDS", 0.3)
    fleet_of(dstack, in_state(Crashed()))
    other = run_in(dstack, in_state(Running()))
    until(lambda: all_runs(dstack)[0].raw_status == "running")
    found = {one["kind"]: one for one in reap(credentials, min_age=0)}
    assert (found["fleet"]["stopped"], found["fleet"]["failed"]) == (False, False)
    assert found["fleet"]["reason"].endswith("runs still use it")
    other.stop(abort=True)
    assert set(fleets(dstack)) == {"left"}


def test_a_deletion_that_the_server_refuses_is_a_failure(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    fleet_of(dstack, in_state(Crashed()))
    dstack.faults.add("/fleets/delete", status=403, times=None)
    (finding,) = reap(credentials, min_age=0)
    assert finding["failed"]
    assert describe(finding, dry_run=False).startswith("Not deleted: fleet left")


@pytest.fixture
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_orphaned_runs, "_PAUSE", 0.1)


@pytest.mark.usefixtures("_quick_polls")
@pytest.mark.parametrize("make", [Cancelling, Crashed])
def test_the_hook_deletes_the_fleet_after_the_runs(
    make: Callable[[], State[Any]], dstack: LocalServer, credentials: DstackCredentials
) -> None:
    owner, other = in_state(Running()), in_state(Running())
    fleet_of(dstack, owner)
    fleet_of(dstack, other, "others")
    run_in(dstack, owner)
    until(lambda: all_runs(dstack)[0].raw_status == "running")
    stop_dstack_runs(credentials)(idle, owner, make())
    assert set(fleets(dstack)) == {"others"}


@pytest.mark.usefixtures("_quick_polls")
def test_the_hook_keeps_the_fleet_of_a_run_that_is_kept(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    owner = in_state(Running())
    fleet_of(dstack, owner)
    run_in(dstack, owner, on_crash="keep")
    stop_dstack_runs(credentials)(idle, owner, Crashed())
    assert set(fleets(dstack)) == {"left"}
    stop_dstack_runs(credentials)(idle, owner, Cancelling())
    assert fleets(dstack) == {}
