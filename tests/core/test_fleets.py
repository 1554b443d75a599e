"""A fleet is created or updated exactly once, whatever gets lost, and never one of another owner (PROTOCOL 1.2)."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core._flow.fleets import PAUSE_SECONDS, apply_fleet, delete_fleet, wait_for_machines
from dstack_core._flow.retry import RetryBudget, TimeLimit, retrying, within
from dstack_core._flow.steps import Flow
from dstack_core._flow.version_check import VersionCheck
from dstack_core._wire.api import Api
from dstack_core._wire.fleets import FleetApi
from dstack_core.errors import (
    RequestRejectedError,
    ResourceNameTakenError,
    ServerUnreachableError,
    WaitTimeoutError,
)
from dstack_core.integration import check_machines
from tests.core.scripted import LOST, MISSING, Driver, Script, recorded, reply

API = FleetApi(Api("http://server", "main"))
WANTED = dstack.FleetConfiguration(name="train", nodes="0..2")
CHANGED = "Failed to apply plan. Resource has been changed. Try again or use force apply."
BUSY = "Failed to update fleet: fleet is being processed currently. Try again later."
FIELDS = "Failed to update fields ['idle_duration']. Can only update ['nodes', 'tags']."


def refusal(text: str, code: str = "error") -> Any:
    return reply({"detail": [{"msg": text, "code": code}]}, 400)


class Server:
    """A server with at most one fleet; a loss swallows a request before it is carried out, or its reply after."""

    def __init__(self, *losses: Any, release: str = "0.22.5", **fleet: Any) -> None:
        self.losses = list(losses)
        self.release = release
        self.created = self.updated = 0
        self.fleet: dict[str, Any] | None = self.new(**fleet) if fleet else None

    def new(
        self,
        marker: str | None = "mine",
        nodes: Any = None,
        status: str = "active",
        fleet_id: str = "first",
        instances: Any = (),
    ) -> dict[str, Any]:
        body: dict[str, Any] = copy.deepcopy(recorded("fleets_apply_elastic_0.22.5"))
        body |= {"id": fleet_id, "name": "train", "status": status, "instances": list(instances)}
        body["spec"] = self.stored(
            {
                "configuration": {"type": "fleet", "name": "train", "nodes": nodes or "0..2"},
                "configuration_path": marker,
            }
        )
        return body

    def stored(self, spec: dict[str, Any]) -> dict[str, Any]:
        least, _, most = str(spec["configuration"]["nodes"]).partition("..")
        nodes = {"min": int(least), "max": int(most or least)}
        configuration = {"env": {}, "blocks": 1, "retry": None} | spec["configuration"] | {"nodes": nodes}
        return {"configuration_path": None} | spec | {"configuration": configuration}

    def get(self, body: dict[str, Any]) -> Any:
        return reply(self.fleet) if self.fleet else MISSING

    def plan(self, body: dict[str, Any]) -> Any:
        spec = self.stored(body["spec"])
        plan: dict[str, Any] = {"spec": spec, "current_resource": self.fleet, "offers": [], "total_offers": 0}
        if self.release != "0.18.44":
            plan |= {"effective_spec": spec, "action": "update" if self.fleet else "create"}
        return reply(plan)

    def apply(self, body: dict[str, Any]) -> Any:
        plan = body["plan"]
        return self.change(plan["spec"], plan.get("current_resource"))

    def create(self, body: dict[str, Any]) -> Any:
        return self.change(body["spec"], None)

    def change(self, spec: dict[str, Any], current: Any) -> Any:
        loss = self.losses.pop(0) if self.losses else ""
        if loss == "before":
            return LOST
        if loss and loss != "after":
            return loss() if callable(loss) else loss
        if self.fleet and current is None:
            return (
                refusal("Resource exists", "resource_exists")
                if self.release == "0.18.44"
                else refusal(CHANGED)
            )
        if current is not None and current != self.fleet:
            return refusal(CHANGED)
        if self.fleet:
            self.updated += 1
            self.fleet = self.fleet | {"spec": self.stored(spec)}
        else:
            self.created += 1
            self.fleet = self.new(fleet_id="created") | {"spec": self.stored(spec)}
        return LOST if loss == "after" else reply(self.fleet)

    def delete(self, body: dict[str, Any]) -> Any:
        if self.losses:
            return self.losses.pop(0)
        if self.fleet:
            self.fleet["status"] = "terminating"
        return reply(None)

    def script(self) -> Script:
        return Script(
            fleets__get=[self.get],
            fleets__get_plan=[self.plan],
            fleets__apply=[self.apply],
            fleets__create=[self.create],
            fleets__delete=[self.delete],
            fleets__delete_instances=[self.delete],
            runs__list=[reply([])],
            server__get_info=[reply({"server_version": self.release})],
        )


def applied(
    driver: Driver, marker: str | None = "mine", nodes: str = "0..2", seconds: float = 30.0
) -> Flow[Any]:
    budget = RetryBudget(seconds, driver.clock)
    wanted = dstack.FleetConfiguration(name="train", nodes=nodes)
    flow = apply_fleet(API, VersionCheck(API.api), wanted, budget, name="train", marker=marker)
    return retrying(flow, budget)


@pytest.mark.parametrize("release", ["0.22.5", "0.18.44"])
@pytest.mark.parametrize("losses", [(), ("before",), ("after",), ("before", "before", "after")])
def test_a_missing_fleet_is_created_once(driver: Driver, losses: tuple[str, ...], release: str) -> None:
    server = Server(*losses, release=release)
    fleet = driver.run(applied(driver), server.script())
    assert (fleet.id, fleet.marker, server.created) == ("created", "mine", 1)


def test_a_fleet_that_another_client_creates_meanwhile_is_found(driver: Driver) -> None:
    server = Server()

    def overtaken() -> Any:
        server.fleet = server.new(marker="other")
        return refusal(CHANGED)

    server.losses = [overtaken]
    with pytest.raises(ResourceNameTakenError, match=r"a fleet of another owner \(other\) has it"):
        driver.run(applied(driver), server.script())
    assert server.created == 0


@pytest.mark.parametrize("owner", ["other", None])
def test_a_fleet_of_another_owner_is_left_alone(driver: Driver, owner: str | None) -> None:
    server = Server(marker=owner)
    script = server.script()
    with pytest.raises(ResourceNameTakenError, match="Choose another name, or delete that fleet first"):
        driver.run(applied(driver, nodes="0..5"), script)
    assert script.paths() == ["fleets/get"]


@pytest.mark.parametrize("marker", ["mine", None])
def test_a_fleet_that_matches_is_left_alone(driver: Driver, marker: str | None) -> None:
    server = Server(marker="mine")
    script = server.script()
    assert driver.run(applied(driver, marker), script).id == "first"
    assert "fleets/apply" not in script.paths()


@pytest.mark.parametrize("losses", [(), ("before",), ("after",), (refusal(BUSY),)])
def test_a_fleet_is_updated_in_place_once(driver: Driver, losses: tuple[Any, ...]) -> None:
    server = Server(*losses, marker="mine")
    fleet = driver.run(applied(driver, nodes="0..5"), server.script())
    assert (fleet.configuration["nodes"], server.updated, server.created) == ({"min": 0, "max": 5}, 1, 0)


def test_without_a_marker_an_updated_fleet_keeps_its_own(driver: Driver) -> None:
    server = Server(marker="theirs")
    assert driver.run(applied(driver, None, nodes="0..5"), server.script()).marker == "theirs"


def test_what_a_server_cannot_update_is_its_own_refusal(driver: Driver) -> None:
    server = Server(refusal(FIELDS), marker="mine")
    script = server.script()
    with pytest.raises(RequestRejectedError, match=r"Failed to update fields \['idle_duration'\]"):
        driver.run(applied(driver, nodes="0..5"), script)
    assert script.paths().count("fleets/apply") == 1


def test_an_old_server_cannot_update_a_fleet(driver: Driver) -> None:
    server = Server(release="0.18.44", marker="mine")
    script = server.script()
    with pytest.raises(RequestRejectedError, match=r"cannot change it in place: nodes. .* dstack >= 0.19.6"):
        driver.run(applied(driver, nodes="0..5"), script)
    assert not {"fleets/apply", "fleets/create"} & set(script.paths())


def test_a_refusal_of_a_new_fleet_is_raised(driver: Driver) -> None:
    server = Server(refusal("nodes are too many"))
    script = server.script()
    with pytest.raises(RequestRejectedError, match="nodes are too many"):
        driver.run(applied(driver), script)
    assert script.paths().count("fleets/apply") == 1


def test_a_server_that_stays_busy_is_given_up(driver: Driver) -> None:
    server = Server(*[refusal(BUSY)] * 50, marker="mine")
    with pytest.raises(RequestRejectedError, match="being processed currently"):
        driver.run(applied(driver, nodes="0..5"), server.script())
    assert len(server.losses) > 30


def test_lost_replies_are_retried_for_the_budget(driver: Driver) -> None:
    server = Server(*["before"] * 100)
    with pytest.raises(ServerUnreachableError):
        driver.run(applied(driver), server.script())
    assert 29 < sum(driver.clock.slept) < 90


def test_a_fleet_that_is_being_deleted_is_waited_for(driver: Driver) -> None:
    server = Server(status="terminating")
    left = [3]

    def gone(body: dict[str, Any]) -> Any:
        left[0] -= 1
        if left[0] == 0:
            server.fleet = None
        return server.get(body)

    script = server.script()
    script.answers["fleets/get"] = [gone]
    assert driver.run(applied(driver), script).id == "created"
    assert driver.clock.slept == [PAUSE_SECONDS, PAUSE_SECONDS]


def test_a_deletion_that_takes_too_long_is_an_error(driver: Driver) -> None:
    server = Server(status="terminating")
    with pytest.raises(ResourceNameTakenError, match="is still being deleted"):
        driver.run(applied(driver), server.script())


def deleted(**options: Any) -> Flow[Any]:
    given: dict[str, Any] = {"instances": None, "marker": None, "until_deleted": False} | options
    return delete_fleet(API, "train", **given)


def test_a_fleet_is_deleted(driver: Driver) -> None:
    server = Server(marker="mine")
    script = server.script()
    assert driver.run(deleted(marker="mine"), script) is True
    assert script.bodies("fleets/delete") == [{"names": ["train"]}]


def test_a_missing_fleet_needs_no_deletion(driver: Driver) -> None:
    script = Server().script()
    assert driver.run(deleted(), script) is False
    assert script.paths() == ["fleets/get"]


def test_a_fleet_of_another_owner_is_not_deleted(driver: Driver) -> None:
    script = Server(marker="other").script()
    with pytest.raises(ResourceNameTakenError):
        driver.run(deleted(marker="mine"), script)
    assert script.paths() == ["fleets/get"]


@pytest.mark.parametrize(("text", "requests"), [(BUSY, 2), ("Failed to delete fleets: in use", 1)])
def test_only_a_passing_refusal_of_a_deletion_is_tried_again(
    driver: Driver, text: str, requests: int
) -> None:
    script = Server(refusal(text), marker="mine").script()
    if requests == 1:
        with pytest.raises(RequestRejectedError, match="in use"):
            driver.run(deleted(), script)
    else:
        assert driver.run(deleted(), script) is True
    assert script.paths().count("fleets/delete") == requests


IN_USE = "Failed to delete fleet train. Fleet is in use."


@pytest.mark.parametrize("end", ["free", "missing", "another"])
def test_a_fleet_that_runs_use_is_deleted_once_they_have_ended(driver: Driver, end: str) -> None:
    server = Server(refusal(IN_USE), refusal(IN_USE), marker="mine")
    script = server.script()
    last = {"free": server.fleet, "missing": None, "another": server.new(fleet_id="second")}[end]
    now = iter([server.fleet, server.fleet])

    def get(body: dict[str, Any]) -> Any:
        server.fleet = next(now, last)
        return server.get(body)

    script.answers["fleets/get"] = [get]
    assert driver.run(deleted(wait_for_runs=True), script) is True
    assert driver.clock.slept == [PAUSE_SECONDS, PAUSE_SECONDS]
    # Not the other fleet that has the name by then.
    assert script.paths().count("fleets/delete") == (3 if end == "free" else 2)


@pytest.mark.parametrize("named", ["train", {"name": "train"}, "main/train"])
def test_a_fleet_is_kept_for_a_run_that_waits_for_a_machine_of_it(driver: Driver, named: Any) -> None:
    server = Server(marker="mine")
    script = server.script()
    waiting = copy.deepcopy(recorded("runs_list_0.22.5")[0])
    waiting["run_spec"]["profile"] = None
    waiting["run_spec"]["configuration"]["fleets"] = [named]
    other = copy.deepcopy(waiting)
    other["run_spec"]["configuration"]["fleets"] = ["another"]
    script.answers["runs/list"] = [reply([other, waiting]), reply([other, waiting]), reply([other])]
    assert driver.run(deleted(wait_for_runs=True), script) is True
    assert driver.clock.slept == [PAUSE_SECONDS, PAUSE_SECONDS]
    assert script.paths().count("fleets/delete") == 1
    script = server.script()
    assert driver.run(deleted(), script) is True
    assert "runs/list" not in script.paths()


def test_a_fleet_that_runs_use_is_not_waited_for_unasked(driver: Driver) -> None:
    script = Server(refusal(IN_USE), marker="mine").script()
    with pytest.raises(RequestRejectedError, match="in use"):
        driver.run(deleted(), script)


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({"nodes": 0}, 0),
        ({"nodes": 2}, 2),
        ({"nodes": "1..3"}, 1),
        ({"nodes": "..3"}, 0),
        ({"nodes": "4"}, 4),
        ({"nodes": {"min": 1, "max": 3}}, 1),
        ({"nodes": {"min": 0, "target": 2, "max": 3}}, 2),
        ({"ssh_config": {"hosts": ["10.0.0.1", "10.0.0.2"]}}, 2),
    ],
)
def test_how_many_machines_a_fleet_starts_with(given: dict[str, Any], number: int) -> None:
    assert dstack.FleetConfiguration(**given).machines_at_start == number


MACHINE = {"id": "m", "project_name": "main", "name": "train-0", "instance_num": 0, "status": "idle"}


@pytest.mark.parametrize("end", ["missing", "another", "terminated"])
def test_the_end_of_a_deletion_is_waited_for(driver: Driver, end: str) -> None:
    server = Server(marker="mine")
    script = server.script()
    now = iter([server.fleet, server.fleet, server.fleet])
    last = {"missing": None, "another": server.new(fleet_id="second"), "terminated": server.new(status=end)}[
        end
    ]

    def get(body: dict[str, Any]) -> Any:
        server.fleet = next(now, last)
        return server.get(body)

    script.answers["fleets/get"] = [get]
    assert driver.run(deleted(until_deleted=True), script) is True
    assert driver.clock.slept == [PAUSE_SECONDS, PAUSE_SECONDS]


def test_single_machines_are_deleted(driver: Driver) -> None:
    server = Server(marker="mine", instances=[MACHINE, MACHINE | {"instance_num": 1}])
    script = server.script()

    def remove(body: dict[str, Any]) -> Any:
        assert server.fleet is not None
        server.fleet["instances"] = [MACHINE]
        return reply(None)

    script.answers["fleets/delete_instances"] = [remove]
    assert driver.run(deleted(instances=[1], until_deleted=True), script) is True
    assert script.bodies("fleets/delete_instances") == [{"name": "train", "instance_nums": [1]}]


def waited(driver: Driver, number: int) -> Flow[Any]:
    return within(wait_for_machines(API, "train", number), TimeLimit(20, "too long", "", driver.clock))


def test_ready_machines_are_waited_for(driver: Driver) -> None:
    machines: list[list[dict[str, Any]]] = [
        [MACHINE | {"status": "provisioning"}],
        [MACHINE, MACHINE | {"status": "provisioning", "instance_num": 1}],
        [MACHINE, MACHINE | {"status": "busy", "instance_num": 1}],
    ]
    answers: list[Any] = [reply(Server().new(instances=each)) for each in machines]
    fleet = driver.run(waited(driver, 2), Script(fleets__get=answers))
    assert [each.status for each in fleet.instances] == ["idle", "busy"]


@pytest.mark.parametrize("status", ["terminating", "terminated", "failed"])
def test_a_fleet_without_a_future_is_not_waited_for(driver: Driver, status: str) -> None:
    assert driver.run(waited(driver, 1), Server(status=status).script()).status == status


def test_a_status_of_a_newer_server_is_waited_for(driver: Driver) -> None:
    later = [Server(status="warming").script().answers["fleets/get"][0], Server(instances=[MACHINE]).get]
    fleet = driver.run(waited(driver, 1), Script(fleets__get=later))
    assert [each.is_ready for each in fleet.instances] == [True]


def test_machines_that_end_cost_nothing_more() -> None:
    statuses = {"idle": 1.0, "busy": 2.0, "warming": 4.0, "terminating": 8.0, "terminated": 16.0}
    fleet = dstack.Fleet(
        "f-1", "train", "main", "active", datetime.now(UTC),
        tuple(dstack.Instance(s, 0, s, s, price_per_hour=price) for s, price in statuses.items()),
    )  # fmt: skip
    assert fleet.price_per_hour == 7.0


def test_a_missing_fleet_is_not_waited_for(driver: Driver) -> None:
    assert driver.run(waited(driver, 1), Server().script()) is None


def test_a_wait_for_machines_ends_with_its_limit(driver: Driver) -> None:
    with pytest.raises(WaitTimeoutError, match="too long"):
        driver.run(waited(driver, 1), Server(marker="mine").script())


@pytest.mark.parametrize(
    ("nodes", "error"),
    [
        ("3..0", "expected a minimum that is not above the maximum, got '3..0'"),
        ("two", "expected a number such as 2"),
        ("..", "expected a number such as 2"),
        (-1, "expected a number such as 2"),
        (True, "expected a number such as 2"),
        ({"min": 1, "max": "x"}, "expected a number such as 2"),
    ],
)
def test_nodes_that_no_server_accepts_are_refused(nodes: Any, error: str) -> None:
    with pytest.raises(dstack.ConfigurationError, match=rf"FleetConfiguration.nodes: {error}"):
        dstack.FleetConfiguration(name="train", nodes=nodes)


@pytest.mark.parametrize("nodes", [0, 2, "2", "0..", "..3", {"min": 0, "max": None}, {"min": 1, "target": 2}])
def test_every_form_of_nodes_is_accepted(nodes: Any) -> None:
    assert dstack.FleetConfiguration(name="train", nodes=nodes).nodes == nodes


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({"nodes": 2}, 2),
        ({"nodes": "1..3"}, 3),
        ({"nodes": "1.."}, None),
        ({"nodes": {"min": 1}}, None),
        ({"nodes": {"min": 1, "max": 4}}, 4),
        ({"ssh_config": {"hosts": ["10.0.0.1", "10.0.0.2"]}}, 2),
    ],
)
def test_no_more_machines_are_waited_for_than_a_fleet_can_have(
    given: dict[str, Any], most: int | None
) -> None:
    configuration = dstack.FleetConfiguration(**given)
    assert configuration.most_machines == most
    check_machines("machines", most or 100, configuration)
    if most is not None:
        with pytest.raises(dstack.ConfigurationError, match=f"^machines: expected at most {most}, .* got 9"):
            check_machines("machines", 9, configuration)


def test_a_wait_for_more_machines_than_the_nodes_allow_is_refused_at_once(driver: Driver) -> None:
    script = Server(instances=[MACHINE]).script()
    with pytest.raises(
        dstack.ConfigurationError, match=r"at most 2, as many as the fleet's nodes, got 3\. Wait"
    ):
        driver.run(waited(driver, 3), script)
    assert script.paths() == ["fleets/get"]


@pytest.mark.parametrize(
    ("given", "got"), [({}, "neither"), ({"nodes": 1, "ssh_config": {"hosts": ["a"]}}, "both")]
)
def test_a_fleet_has_either_nodes_or_hosts_of_its_own(given: dict[str, Any], got: str) -> None:
    for form in (given, dstack.FleetConfiguration(**given)):
        with pytest.raises(dstack.ConfigurationError, match=rf"expected nodes such as .* got {got}\."):
            dstack.load_fleet(form)
