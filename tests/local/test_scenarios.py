"""Each scenario ends a run as a real server does, with its statuses, reasons and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dstack_core import Client
from dstack_core.local import LocalServer, VirtualTime

RETRY = {"on_events": ["no-capacity", "interruption", "error"], "duration": "4h"}


@pytest.fixture
def time() -> Iterator[VirtualTime]:
    with VirtualTime() as time:
        yield time


@pytest.fixture
def server(time: VirtualTime) -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


def task(command: str = "echo trained", **more: Any) -> dict[str, Any]:
    return {"type": "task", "name": "train", "commands": [command], **more}


def test_capacity_comes_after_a_time(time: VirtualTime, server: LocalServer, client: Client) -> None:
    server.scenarios.capacity_after(600)
    run = client.runs.submit(task(retry=RETRY))
    assert run.wait(poll_interval=30).succeeded
    assert 600 < time.passed < 700
    (seen,) = server.runs
    assert seen.attempts > 5
    assert set(seen.job_reasons[:-1]) == {"failed_to_start_due_to_no_capacity"}
    assert seen.log == ("trained",)
    assert server.scenarios.unused == []


def test_without_retry_no_capacity_ends_the_run_and_later_there_is_some(
    time: VirtualTime, server: LocalServer, client: Client
) -> None:
    server.scenarios.capacity_after(60)
    outcome = client.runs.submit(task()).wait(poll_interval=1)
    assert (outcome.reason, outcome.category) == ("failed_to_start_due_to_no_capacity", "capacity.none")
    time.sleep(60)
    assert client.runs.submit(task()).wait(poll_interval=1).succeeded


def test_a_spot_machine_is_interrupted_and_the_run_is_tried_again(
    time: VirtualTime, server: LocalServer, client: Client
) -> None:
    server.scenarios.interrupt_after(10)
    run = client.runs.submit(task("echo began; sleep 600; echo ended", spot_policy="auto", retry=RETRY))
    outcome = run.wait(poll_interval=10)
    assert outcome.succeeded
    assert 730 < time.passed < 830
    (seen,) = server.runs
    assert seen.job_reasons == ("interrupted_by_no_capacity", "done_by_runner")
    assert seen.log == ("began", "began", "ended")


@pytest.mark.parametrize(
    ("spot_policy", "lose", "category"),
    [
        ("spot", "interrupt_after", "spot.interrupted"),
        ("on-demand", "interrupt_after", "machine.lost"),
        ("spot", "lose_machine", "machine.lost"),
    ],
)
def test_only_a_spot_machine_is_interrupted(
    time: VirtualTime, server: LocalServer, client: Client, spot_policy: str, lose: str, category: str
) -> None:
    getattr(server.scenarios, lose)(5)
    run = client.runs.submit(task("sleep 1h", spot_policy=spot_policy))
    outcome = run.wait(poll_interval=10)
    assert outcome.category == category
    assert 125 < time.passed < 225
    (wire,) = (job["job_submissions"][-1] for job in client_json(server, run.name)["jobs"])
    assert wire["termination_reason_message"] == "Instance is unreachable"
    assert wire["status_message"] == ("interrupted" if category == "spot.interrupted" else "error")
    assert wire["exit_status"] is None


def client_json(server: LocalServer, name: str) -> dict[str, Any]:
    import requests

    found: dict[str, Any] = requests.post(
        f"{server.url}/api/project/{server.project}/runs/get",
        json={"run_name": name},
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=30,
    ).json()
    return found


def test_a_lost_machine_still_counts_as_running_and_can_be_stopped(
    time: VirtualTime, server: LocalServer, client: Client
) -> None:
    server.scenarios.lose_machine(1)
    run = client.runs.submit(task("sleep 1h"))
    time.sleep(60)
    assert server.runs[0].status == "running"
    result = run.stop(until="ended", timeout=60)
    assert result.outcome is not None
    assert result.outcome.reason == "stopped_by_user"


@pytest.mark.parametrize(
    ("arguments", "category"),
    [([], "image.pull_failed"), (["manifest for a:9 not found: manifest unknown"], "image.not_found")],
)
def test_a_pull_fails(
    time: VirtualTime, server: LocalServer, client: Client, arguments: list[str], category: str
) -> None:
    server.scenarios.fail_pull(*arguments)
    outcome = client.runs.submit(task()).wait(poll_interval=1)
    assert (outcome.category, outcome.exit_status) == (category, None)
    assert client.runs.submit(task()).wait(poll_interval=1).succeeded


def test_a_stop_is_dropped_and_the_client_repeats_it(
    time: VirtualTime, server: LocalServer, client: Client
) -> None:
    server.scenarios.forget_stop()
    run = client.runs.submit(task("sleep 1d"))
    time.sleep(5)
    result = run.stop(until="ended", timeout=60)
    assert (str(result.state), result.requests) == ("ended", 2)
    assert server.runs[0].stop_requests == 2


def test_scenarios_combine_and_name_runs(time: VirtualTime, server: LocalServer, client: Client) -> None:
    server.scenarios.fail_pull(run="train", times=2)
    server.scenarios.capacity_after(60, run="train")
    server.scenarios.slow(2, path="runs/get")
    other = client.runs.submit(task(), run_name="evaluate").wait(poll_interval=1)
    run = client.runs.submit(task(retry=RETRY), run_name="nightly-train-9k2f01xq")
    assert other.succeeded
    assert run.wait(poll_interval=10).succeeded
    reasons = server.runs[1].job_reasons
    assert reasons[-3:] == ("creating_container_error", "creating_container_error", "done_by_runner")
    assert set(reasons[:-3]) == {"failed_to_start_due_to_no_capacity"}
    server.scenarios.fail_pull(run="trai")
    assert client.runs.submit(task()).wait(poll_interval=1).succeeded
    assert server.scenarios.unused == ["fail_pull of run 'trai'"]
    server.scenarios.clear()
    assert server.scenarios.unused == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.capacity_after(0), "capacity_after: expected seconds greater than 0, got 0."),
        (lambda s: s.capacity_after("1h"), "capacity_after: expected seconds greater than 0, got '1h'."),
        (lambda s: s.interrupt_after(-1), "interrupt_after: expected seconds of 0 or more, got -1."),
        (lambda s: s.lose_machine(float("nan")), "lose_machine: expected after of 0 or more, got nan."),
        (lambda s: s.lose_machine(noticed_after=None), "lose_machine: expected noticed_after of 0 or more, got None."),
        (lambda s: s.fail_pull(times=0), "fail_pull: expected times of 1 or more, got 0."),
        (lambda s: s.forget_stop(times=True), "forget_stop: expected times of 1 or more, got True."),
        (lambda s: s.fail_pull(run=""), 'run: expected the name of a run such as "train", got \'\'.'),
        (lambda s: s.capacity_after(10**400), f"capacity_after: expected seconds greater than 0, got {10**400}."),
        (lambda s: s.fail_pull(None), "fail_pull: expected a message such as 'manifest unknown', got None."),
        (lambda s: s.slow(-1), "slow: expected seconds of 0 or more, got -1."),
        (lambda s: s.slow("2s"), "slow: expected seconds of 0 or more, got '2s'."),
        (lambda s: s.slow(1, "2s"), "slow: expected longest of 0 or more, got '2s'."),
        (lambda s: s.slow(2, 1), "slow: expected 0 <= seconds <= longest, got 2 and 1"),
        (lambda s: s.slow(1, path=None), 'slow: expected a part of a path such as "runs/get", got None.'),
    ],
)  # fmt: skip
def test_bad_use_is_one_clear_error(call: Callable[[Any], None], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        call(LocalServer().scenarios)
    assert str(raised.value) == message


PRICES = {"aws/us-east-1": 3.6, "gcp/us-west1": 1.8, "aws/eu-west-1": 7.2}


def test_offers_and_runs_have_the_prices_of_their_regions(server: LocalServer, client: Client) -> None:
    server.scenarios.offer_in(PRICES)
    offers = client.offers().offers
    assert {f"{one.backend}/{one.region}": one.price_per_hour for one in offers} == PRICES
    assert [one.price_per_hour for one in offers] == [1.8, 3.6, 7.2]
    assert [one.region for one in client.offers(backends=["aws"]).offers] == ["us-east-1", "eu-west-1"]
    assert [one.backend for one in client.offers(max_price=2).offers] == ["gcp"]
    assert client.offers(regions=["eu-west-1"], max_price=2).offers == ()


@pytest.mark.parametrize(
    ("wanted", "place", "price"),
    [
        ({}, "gcp/us-west1", 1.8),
        ({"backends": ["aws"]}, "aws/us-east-1", 3.6),
        ({"regions": ["eu-west-1"]}, "aws/eu-west-1", 7.2),
        ({"backends": ["aws"], "max_price": 5}, "aws/us-east-1", 3.6),
    ],
)
def test_a_run_gets_the_cheapest_place_that_it_allows_and_costs_its_price(
    server: LocalServer, client: Client, wanted: dict[str, Any], place: str, price: float
) -> None:
    server.scenarios.offer_in(PRICES)
    outcome = client.runs.submit(task("sleep 1000", **wanted)).wait(poll_interval=30)
    assert outcome.succeeded
    assert (f"{outcome.backend}/{outcome.region}", outcome.price_per_hour) == (place, price)
    assert 1000 * price / 3600 <= outcome.cost < 1100 * price / 3600
    assert server.runs[0].place == place


@pytest.mark.parametrize("wanted", [{"backends": ["azure"]}, {"regions": ["eu-west-1"], "max_price": 5}])
def test_a_run_that_no_place_suits_finds_no_capacity(
    server: LocalServer, client: Client, wanted: dict[str, Any]
) -> None:
    server.scenarios.offer_in(PRICES)
    outcome = client.runs.submit(task(**wanted)).wait(poll_interval=1)
    assert (outcome.succeeded, outcome.category) == (False, "capacity.none")
    assert server.runs[0].place is None


def test_prices_may_change_and_are_the_servers_own_again_after_clear(time: VirtualTime) -> None:
    with LocalServer(regions={"aws/us-east-1": 1.0}) as server, server.client() as client:
        server.scenarios.offer_in(PRICES)
        assert client.offers().offers[0].backend == "gcp"
        server.scenarios.offer_in({"lambda/us-east-1": 0.5})
        assert [one.price_per_hour for one in client.offers().offers] == [0.5]
        server.scenarios.clear()
        assert [(one.backend, one.price_per_hour) for one in client.offers().offers] == [("aws", 1.0)]


@pytest.mark.parametrize("regions", [{}, None, ["aws/x"], {"us-east-1": 1.0}, {"aws/x": -1}])
def test_wrong_places_are_refused(server: LocalServer, regions: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        server.scenarios.offer_in(regions)
