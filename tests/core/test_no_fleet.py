"""A project without a fleet: a plan and a run show both ways to one; other plans ask nothing more."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import dstack_core as dstack
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.integration import describe_failure, plan_hints, raise_for_outcome
from dstack_core.local import LocalServer
from dstack_core.models.no_fleet import FLEET_FILE
from dstack_core.models.plan import Plan
from tests.core.scripted import Driver, Script, recorded, reply

TASK = {"type": "task", "commands": ["true"]}
WAYS = ("dstack apply -f", "  type: fleet\n", "  nodes: 0..2\n", "client.fleets.apply(...)")


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer(needs_fleet=True, instance_seconds=0.01) as started:
        yield started


def test_a_plan_and_a_run_without_a_fleet_show_both_ways_to_one(server: LocalServer) -> None:
    with server.client() as client:
        plan = client.runs.plan(TASK)
        assert (plan.offers, plan.fleets) == ((), 0)
        assert all(way in plan_hints(plan) for way in WAYS)
        assert "needs one since dstack 0.20" in plan_hints(plan)
        assert plan_hints(plan, fleet_option="dstack_fleet").endswith("from code with dstack_fleet.")
        outcome = client.runs.submit(TASK).wait(poll_interval=0.1)
        with pytest.raises(dstack.NoFleetError) as caught:
            outcome.raise_for_status()
        assert all(way in caught.value.message for way in WAYS)
        text = describe_failure(outcome, retry_option="retry_policy", fleet_option="dstack_fleet")
        assert text.endswith("from code with dstack_fleet (capacity.no_fleet).")
        assert "retry_policy" not in text
        with pytest.raises(dstack.NoFleetError):
            raise_for_outcome(outcome)

    async def planned() -> Plan:
        async with dstack.AsyncClient(
            server_url=server.url, project_name="main", user_token=server.token
        ) as client:
            return await client.runs.plan(TASK)

    assert asyncio.run(planned()) == plan


def test_the_file_is_one_that_makes_the_run_work(server: LocalServer) -> None:
    with server.client() as client:
        client.fleets.apply(yaml.safe_load(FLEET_FILE))
        plan = client.runs.plan(TASK)
        assert plan.offers
        assert (plan.fleets, plan.hints) == (None, ())
        assert client.runs.submit(TASK).wait(poll_interval=0.1).succeeded
        dear = client.runs.plan({**TASK, "max_price": 0.01})
        assert dear.fleets == 1
        assert plan_hints(dear).startswith("Project main: its fleet offers no machine for this run.")
        client.fleets.delete("machines", until="deleted", timeout=20)


def planned_on(driver: Driver, plan: Any, release: str, fleets: Any) -> tuple[Plan, list[str]]:
    script = Script(
        runs__get_plan=[reply(plan)],
        server__get_info=[reply({"server_version": release})],
        users__get_my_user=[reply({"username": "me", "ssh_public_key": "ssh-rsa AAAA"})],
        fleets__list=[fleets],
    )
    flow = Operations(Api("http://server", "main"), 30.0, clock=driver.clock).plan(TASK, {})
    return driver.run(flow, script), [path for path in script.paths() if path != "users/get_my_user"]


@pytest.mark.parametrize(
    ("release", "fleets", "count", "is_listed"),
    [
        ("0.22.5", reply([]), 0, True),
        ("0.19.40", reply([]), None, False),
        ("latest", reply([]), None, False),
        ("0.22.5", reply({"detail": [{"msg": "no", "code": "error"}]}, 400), None, True),
    ],
)
def test_only_servers_whose_runs_need_a_fleet_are_asked(
    driver: Driver, release: str, fleets: Any, count: int | None, is_listed: bool
) -> None:
    bare = recorded("get_plan_minimal_0.22.5_no_fleet")
    plan, paths = planned_on(driver, bare, release, fleets)
    assert plan.fleets == count
    assert bool(plan.hints) == (count is not None)
    assert ("fleets/list" in paths) == is_listed


def test_a_plan_with_offers_asks_nothing_more(driver: Driver) -> None:
    bare = copy.deepcopy(recorded("get_plan_minimal_0.22.5_no_fleet"))
    bare["job_plans"][0]["offers"] = [{"backend": "aws", "region": "us-east-1", "price": 1.2}]
    plan, paths = planned_on(driver, bare, "0.22.5", reply([]))
    assert (len(plan.offers), plan.fleets, plan.hints) == (1, None, ())
    assert paths == ["runs/get_plan"]
