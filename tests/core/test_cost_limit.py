"""``max_cost``: who stops a run at its limit, what it costs at most, and how its end is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import clock
from dstack_core._flow.cost_limit import with_guard
from dstack_core._flow.follow import FollowOptions, follow
from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._wire.api import Api
from dstack_core._wire.machine_counts import most_machines
from dstack_core._wire.runs import outcome_of, parse_run
from dstack_core.integration import category_of
from dstack_core.local import LocalServer, VirtualTime
from dstack_core.models.outcome import Outcome
from dstack_core.models.progress import Progress
from tests.core.scripted import LOST, Driver, Script, recorded, reply, run_json

API = Api("http://server", "main")
# 0.001 USD a second.
PRICE = 3.6
LONG = dstack.Task(commands=["sleep 100000"])
SHORT = dstack.Task(commands=["sleep 60"])


@pytest.fixture
def time() -> Iterator[VirtualTime]:
    with VirtualTime() as time:
        yield time


@pytest.fixture
def server(time: VirtualTime) -> Iterator[LocalServer]:
    with LocalServer(price=PRICE) as server:
        yield server


# -- A run that is followed


def assert_stopped_at_the_limit(error: dstack.RunLimitError, poll_interval: float) -> None:
    outcome = error.outcome
    assert outcome.category == category_of(error) == "limit.max_cost"
    assert outcome.status is dstack.RunStatus.FAILED
    assert outcome.reason == "max_cost_exceeded"
    # One poll, the server's stop, and what a busy machine takes to answer.
    assert 1 <= outcome.cost < 1 + (poll_interval + 30) * PRICE / 3600
    assert "stopped at its cost limit (it cost 1.0" in str(error)
    assert "and max_cost is 1.00 USD)" in str(error)


@pytest.mark.parametrize("poll_interval", [5, 60])
def test_a_run_is_stopped_when_it_has_cost_as_much(server: LocalServer, poll_interval: float) -> None:
    with server.client() as client:
        run = client.runs.submit(LONG, max_cost=1, max_duration="10h")
        # The commands begin later than the cost: the follower is first.
        assert run.env == {"DSTACK_MAX_COST": "1", "DSTACK_MAX_COST_SECONDS": "1000"}
        with pytest.raises(dstack.RunLimitError) as caught:
            run.wait(poll_interval=poll_interval).raise_for_status()
    assert_stopped_at_the_limit(caught.value, poll_interval)


@pytest.mark.parametrize("kind", [dstack.AsyncClient, dstack.SharedAsyncClient])
def test_it_is_stopped_in_async_too(server: LocalServer, kind: type[dstack.AsyncClient]) -> None:
    async def work() -> None:
        async with kind(
            server_url=server.url, project_name=server.project, user_token=server.token
        ) as client:
            run = await client.runs.submit(LONG, max_cost=Decimal("1.00"))  # type: ignore[arg-type]
            with pytest.raises(dstack.RunLimitError) as caught:
                (await run.wait()).raise_for_status()
            assert_stopped_at_the_limit(caught.value, 5)

    asyncio.run(work())


def test_a_run_below_the_limit_succeeds(server: LocalServer) -> None:
    with server.client() as client:
        outcome = client.runs.submit(SHORT, max_cost=1).wait()
        assert outcome.succeeded
        assert 0 < outcome.cost < 1


def test_who_did_not_submit_the_run_stops_it_too(server: LocalServer) -> None:
    with server.client() as client, server.client() as other:
        name = client.runs.submit(LONG, max_cost=1).name
        found = other.runs.get(name)
        assert found is not None
        assert found.wait().category == "limit.max_cost"
        # Who only reads it afterwards sees why it ended.
        again = client.runs.get(name)
        assert again is not None
        assert again.raw_status == "terminated"
        ended = again.outcome()
        assert ended is not None
        assert ended.category == "limit.max_cost"


def test_a_stop_of_a_user_before_the_limit_stays_a_stop(server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit(LONG, max_cost=1)
        run.stop(until="ended")
        assert run.wait().category == "stopped.by_user"


# -- Steps of a follower


def priced(status: str, cost: float, **env: str) -> Any:
    body = run_json(status, cost=cost)
    body["run_spec"]["configuration"]["env"] = {"DSTACK_MAX_COST": "1", **env}
    for part in (body["latest_job_submission"], body["jobs"][0]["job_submissions"][-1]):
        part["job_provisioning_data"]["price"] = PRICE
    if status == "terminated":
        body["termination_reason"] = "stopped_by_user"
    return body


def followed(driver: Driver, script: Script, **options: Any) -> Outcome:
    wanted = FollowOptions(
        poll_interval=5, logs=False, wall_clock=driver.clock, **{"longest_log_pause": 60.0, **options}
    )
    progress = Progress("train", "id-1")
    flow = retrying(follow(API, progress, wanted), RetryBudget(600, driver.clock), progress)
    outcome: Outcome = driver.run(flow, script)
    return outcome


class Meter:
    """A server that counts, and replies so many seconds late."""

    def __init__(self, driver: Driver, late: float = 0.0, stop_takes: float = 3.0) -> None:
        self.clock, self.late, self.stop_takes = driver.clock, late, stop_takes
        self.begin = self.clock.now
        self.stopped_at: float | None = None

    def get(self, body: dict[str, Any]) -> Any:
        self.clock.now += self.late
        end = self.clock.now
        if self.stopped_at is not None and end >= self.stopped_at + self.stop_takes:
            ended = self.stopped_at + self.stop_takes
            return reply(priced("terminated", round((ended - self.begin) * PRICE / 3600, 4)))
        status = "running" if self.stopped_at is None else "terminating"
        return reply(priced(status, round((end - self.begin) * PRICE / 3600, 4)))

    def stop(self, body: dict[str, Any]) -> Any:
        self.clock.now += self.late
        self.stopped_at = self.stopped_at or self.clock.now
        return reply(None)


@pytest.mark.parametrize("late", [0.0, 4.0, 55.0])
def test_the_overspend_is_one_poll_the_replies_and_the_stop(driver: Driver, late: float) -> None:
    meter = Meter(driver, late)
    script = Script(runs__get=[meter.get], runs__stop=[meter.stop])
    outcome = followed(driver, script)
    assert outcome.category == "limit.max_cost"
    assert 1 <= outcome.cost <= 1 + (5 + 2 * late + meter.stop_takes) * PRICE / 3600
    assert len(script.bodies("runs/stop")) == 1
    if not late:
        # The limit is known: polls need no more than usual until then, and the one at the limit is on time.
        assert outcome.cost <= 1 + (1.1 + meter.stop_takes) * PRICE / 3600


def test_a_stop_that_is_lost_is_sent_until_it_arrives(driver: Driver) -> None:
    meter = Meter(driver)
    script = Script(runs__get=[meter.get], runs__stop=[LOST, LOST, meter.stop])
    assert followed(driver, script).category == "limit.max_cost"


def test_a_run_that_is_stopping_is_not_stopped_again(driver: Driver) -> None:
    script = Script(runs__get=[reply(priced("terminating", 1.5)), reply(priced("terminated", 1.5))])
    assert followed(driver, script).category == "limit.max_cost"


@pytest.mark.parametrize("price", [0, None])
def test_a_machine_without_a_price_is_polled_as_usual(driver: Driver, price: float | None) -> None:
    body = priced("running", 0.0)
    for part in (body["latest_job_submission"], body["jobs"][0]["job_submissions"][-1]):
        part["job_provisioning_data"]["price"] = price
    script = Script(runs__get=[reply(body), reply(body), reply(priced("done", 0.0))])
    assert followed(driver, script).succeeded
    assert driver.clock.slept == [5, 5]


# -- The server's guard


def test_the_server_ends_a_run_that_has_no_follower(server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit(LONG, max_cost=1)
        began = clock.monotonic()
        # These polls stop nothing.
        while run.refresh().last_status.is_active:
            clock.sleep(60)
        assert 1000 < clock.monotonic() - began < 1200
        assert not any(request.path.endswith("runs/stop") for request in server.requests)
        outcome = run.outcome()
    assert outcome is not None
    assert outcome.category == "limit.max_cost"
    assert outcome.status is dstack.RunStatus.FAILED
    with pytest.raises(dstack.RunLimitError):
        outcome.raise_for_status()


def test_an_own_shorter_max_duration_stays_and_has_its_own_name(server: LocalServer) -> None:
    with server.client() as client:
        run = client.runs.submit(LONG, max_cost=1, max_duration=60)
        assert run.env == {"DSTACK_MAX_COST": "1"}
        assert run.wait().category == "limit.max_duration"


def guard(driver: Driver, plan: Any, max_cost: float = 1.0, **configuration: Any) -> Any:
    spec = {
        "configuration": {"env": {"DSTACK_MAX_COST": str(max_cost)}, **configuration},
        "profile": {},
        "ssh_key_pub": "k",
    }
    script = Script(runs__get_plan=[reply(plan)])
    return driver.run(with_guard(API, spec, spec, max_cost), script)["configuration"]


def plan_with(price: float | None) -> Any:
    plan = recorded("get_plan_minimal_0.22.5_no_fleet")
    plan["job_plans"][0]["max_price"] = price
    return plan


def test_the_guard_is_what_the_money_lasts_at_the_highest_price(driver: Driver) -> None:
    assert guard(driver, plan_with(3.6))["max_duration"] == 1000
    assert guard(driver, plan_with(3.6), nodes=2)["max_duration"] == 500
    assert guard(driver, plan_with(3.6), max_duration="10m")["max_duration"] == "10m"
    assert guard(driver, plan_with(3.6), max_duration="off")["max_duration"] == 1000
    # Without offers, the highest price that is allowed.
    assert guard(driver, plan_with(None), max_price=7.2)["max_duration"] == 500
    # A machine that costs nothing needs none.
    assert "max_duration" not in guard(driver, plan_with(0.0))


def test_a_limit_without_a_price_or_below_one_poll_is_an_error(driver: Driver) -> None:
    with pytest.raises(dstack.ConfigurationError, match=r"^max_cost: expected machines with a price, got"):
        guard(driver, plan_with(None))
    with pytest.raises(dstack.ConfigurationError, match=r"^max_cost: expected more than 0\.005 USD"):
        guard(driver, plan_with(3.6), 0.004)


def test_nothing_is_submitted_where_no_price_is_known() -> None:
    with LocalServer(price=PRICE) as server, server.client() as client:
        with pytest.raises(dstack.ConfigurationError, match="max_cost"):
            client.runs.submit(SHORT, max_cost=1, resources="H200:8")
        with pytest.raises(dstack.ConfigurationError, match="max_cost"):
            client.runs.submit(SHORT, max_cost=0.0001)
        assert client.runs.list(all=True) == []


@pytest.mark.parametrize("wrong", [0, -1, True, "much", float("nan"), float("inf"), [1]])
def test_a_wrong_limit_is_an_error_before_any_request(wrong: Any) -> None:
    with (
        dstack.Client(server_url="http://127.0.0.1:9", project_name="main", user_token="t") as client,
        pytest.raises(dstack.ConfigurationError, match=r"^max_cost: expected USD above 0, got"),
    ):
        client.runs.submit(SHORT, max_cost=wrong)


def test_an_update_in_place_takes_no_limit() -> None:
    with (
        dstack.Client(server_url="http://127.0.0.1:9", project_name="main", user_token="t") as client,
        pytest.raises(dstack.ConfigurationError, match=r"^max_cost: expected a run that is submitted"),
    ):
        client.runs.apply(SHORT, "train", max_cost=1)


def test_a_run_that_exists_needs_no_plan() -> None:
    with LocalServer(price=PRICE) as server, server.client() as client:
        first = client.runs.submit(SHORT, "train", marker="mine", max_cost=1)
        before = [request.path for request in server.requests]
        assert client.runs.submit(SHORT, "train", marker="mine", max_cost=1).id == first.id
        after = [request.path for request in server.requests][len(before) :]
        assert not any(path.endswith("get_plan") for path in after)
        first.stop()


@pytest.mark.parametrize(
    ("configuration", "machines"),
    [
        ({}, 1),
        ({"nodes": 3}, 3),
        ({"replicas": 2}, 2),
        ({"replicas": "1..4"}, 4),
        ({"replicas": {"min": 1, "max": 5}}, 5),
        ({"replicas": [{"count": "0..2"}, {"count": 3}]}, 5),
        ({"groups": [{"nodes": 2}, {}]}, 3),
        ({"replicas": "0..0"}, 1),
    ],
)
def test_the_machines_of_a_run_are_counted(configuration: dict[str, Any], machines: int) -> None:
    assert most_machines({"configuration": configuration}) == machines


# -- What servers send


@pytest.mark.parametrize(
    ("name", "env", "category"),
    [
        ("runs_get_stopped_0.22.5", {"DSTACK_MAX_COST": "0.0000001"}, "limit.max_cost"),
        ("runs_get_stopped_0.22.5", {"DSTACK_MAX_COST": "100"}, "stopped.by_user"),
        ("runs_get_max_duration_0.22.5", {"DSTACK_MAX_COST": "9"}, "limit.max_duration"),
        (
            "runs_get_max_duration_0.22.5",
            {"DSTACK_MAX_COST": "9", "DSTACK_MAX_COST_SECONDS": "60"},
            "limit.max_cost",
        ),
        ("runs_get_failed_0.22.5", {"DSTACK_MAX_COST": "0.0000001"}, "user.exit"),
        ("runs_get_done_0.22.5", {"DSTACK_MAX_COST": "0.0000001"}, ""),
        ("runs_get_stopped_0.22.5", {"DSTACK_MAX_COST": "much"}, "stopped.by_user"),
    ],
)
def test_the_end_of_a_real_run_is_named(name: str, env: dict[str, str], category: str) -> None:
    body = {**recorded(name), "cost": 0.5}
    body["run_spec"]["configuration"]["env"] = env
    assert outcome_of(parse_run(body), "url").category == category


@pytest.mark.parametrize("options", [{}, {"max_cost": 1}, {"env": {"DSTACK_MAX_COST": "5"}}])
@pytest.mark.parametrize("name", ["DSTACK_MAX_COST", "DSTACK_MAX_COST_SECONDS"])
def test_a_variable_of_that_name_is_refused_and_not_replaced(
    server: LocalServer, name: str, options: dict[str, Any]
) -> None:
    env = {} if options.get("env") else {name: "5"}
    with server.client() as client, pytest.raises(dstack.ConfigurationError) as caught:
        client.runs.submit(dstack.Task(commands=["true"], env=env), **options)
    assert str(caught.value).startswith("env: expected variables that no option sets, got DSTACK_MAX_COST")
    assert str(caught.value).endswith("Use the option max_cost, or choose another name.")
    assert server.runs == []


def test_other_variables_that_options_set_are_refused_with_them(server: LocalServer) -> None:
    result, survive = {"DSTACK_RESULT_FILE": "/data/result"}, {"DSTACK_SURVIVE": "1"}
    with server.client() as client:
        with pytest.raises(
            dstack.ConfigurationError, match=r"got DSTACK_SURVIVE\. Use the option survive, or"
        ):
            client.runs.submit(dstack.Task(commands=["true"], env=survive))
        with pytest.raises(
            dstack.ConfigurationError, match=r"got DSTACK_RESULT_FILE, which .* reports=False"
        ):
            client.runs.plan(dstack.Task(commands=["true"], env=result), reports=True)
        assert server.runs == []
        run = client.runs.submit(dstack.Task(commands=["echo $DSTACK_RESULT_FILE"], env=result))
        assert run.env == result
        run.wait()
