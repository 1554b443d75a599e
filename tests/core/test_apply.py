"""A run is submitted or updated in place exactly once, whatever gets lost (PROTOCOL 1.4)."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dstack_core._flow.apply import apply
from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._flow.steps import Flow
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import (
    RequestRejectedError,
    RunNameTakenError,
    RunNotUpdatableError,
    ServerUnreachableError,
)
from tests.core.scripted import LOST, MISSING, Driver, Script, reply, run_json

CONFIGURATION = {"type": "service", "port": 80, "commands": ["serve"], "env": {"A": "1"}, "priority": 0}
SPEC: dict[str, Any] = {
    "run_name": "train",
    "configuration_path": "drawn",
    "configuration": {"type": "service", "port": 80, "commands": ["serve"], "env": {"A": "2"}},
    "profile": {"name": "default"},
    "ssh_key_pub": "key",
}
CHANGED = "Failed to apply plan. Resource has been changed. Try again or use force apply."


def refusal(text: str) -> Any:
    return reply({"detail": [{"msg": text, "code": "error"}]}, 400)


class Server:
    """A server with one run; like a real one, it refuses an update that is based on an older state of the run."""

    def __init__(
        self, *losses: str, status: str = "running", reports_changes: bool = True, **changes: Any
    ) -> None:
        self.losses = list(losses)
        self.reports_changes = reports_changes
        self.run = self.new({"run_name": "train", "configuration_path": "first", "profile": {"name": "default"},
                             "configuration": copy.deepcopy(CONFIGURATION), "ssh_key_pub": "key", **changes}, status)  # fmt: skip
        self.submitted = 0
        self.before_apply: Any = lambda: None

    def new(self, spec: dict[str, Any], status: str = "submitted", run_id: str = "id-1") -> dict[str, Any]:
        body = run_json(status, run_id=run_id)
        body["run_spec"] = spec
        return body | {"deployment_num": 0}

    def effective(self, spec: dict[str, Any]) -> dict[str, Any]:
        return spec | {"configuration": {"priority": 0} | spec["configuration"]}

    def get(self, body: dict[str, Any]) -> Any:
        return reply(self.run) if self.run else MISSING

    def plan(self, body: dict[str, Any]) -> Any:
        spec = self.effective(body["run_spec"])
        old, new = self.run["run_spec"]["configuration"], spec["configuration"]
        is_fine = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} <= {"env", "port"}
        reported = (
            {"effective_run_spec": spec, "action": "update" if is_fine else "create"}
            if self.reports_changes
            else {}
        )
        return reply({"run_spec": spec, "current_resource": self.run or None, "job_plans": [], **reported})

    def apply(self, body: dict[str, Any]) -> Any:
        loss = self.losses.pop(0) if self.losses else ""
        if loss == "before":
            return LOST
        self.before_apply()
        plan = body["plan"]
        spec = self.effective(plan["run_spec"])
        if self.run and self.run["status"] not in ("done", "terminated"):
            seen = plan.get("current_resource")
            if seen is None or seen["run_spec"] != self.run["run_spec"]:
                return refusal(CHANGED)
            self.run = {**self.run, "run_spec": spec, "deployment_num": self.run["deployment_num"] + 1}
        else:
            self.submitted += 1
            self.run = self.new(spec, run_id=f"new-{self.submitted}")
        return LOST if loss == "after" else reply(self.run)

    def script(self) -> Script:
        return Script(runs__get=[self.get], runs__get_plan=[self.plan], runs__apply=[self.apply])


def flow(driver: Driver, spec: dict[str, Any] = SPEC, *, marker: str | None = None) -> Flow[RunSnapshot]:
    budget = RetryBudget(30, driver.clock)
    wanted = spec | ({"configuration_path": marker} if marker else {})
    return retrying(apply(Api("http://server", "main"), wanted, budget, marker=marker), budget)


@pytest.mark.parametrize("losses", [(), ("before",), ("after",), ("before", "after"), ("before", "before")])
@pytest.mark.parametrize("marker", [None, "mine"])
def test_an_update_arrives_once_whatever_is_lost(
    driver: Driver, losses: tuple[str, ...], marker: str | None
) -> None:
    server = Server(*losses)
    run = driver.run(flow(driver, marker=marker), server.script())
    assert (run.id, run.env, run.deployment) == ("id-1", {"A": "2"}, 1)
    assert server.run["deployment_num"] == 1
    assert run.marker == (marker or "first"), "without a marker the run keeps its own"
    again = driver.run(flow(driver, marker=marker), server.script())
    assert (again.id, server.run["deployment_num"], server.submitted) == ("id-1", 1, 0)


def test_the_request_names_the_run_as_it_was_seen_and_never_forces(driver: Driver) -> None:
    server = Server()
    before = copy.deepcopy(server.run)
    script = server.script()
    driver.run(flow(driver), script)
    (body,) = script.bodies("runs/apply")
    assert body["force"] is False
    assert body["plan"]["current_resource"] == before
    assert body["plan"]["run_spec"] == SPEC | {"configuration_path": "first"}
    assert script.paths() == ["runs/get", "runs/get_plan", "runs/apply"]


def test_a_run_that_already_matches_is_left_alone(driver: Driver) -> None:
    server = Server(configuration=CONFIGURATION | {"env": {"A": "2"}})
    script = server.script()
    assert driver.run(flow(driver), script).id == "id-1"
    assert "runs/apply" not in script.paths()
    driver.run(flow(driver, marker="mine"), script)
    assert (server.run["run_spec"]["configuration_path"], server.run["deployment_num"]) == ("mine", 1)


@pytest.mark.parametrize("losses", [(), ("before",), ("after",)])
@pytest.mark.parametrize("status", ["done", "terminated", "missing"])
def test_without_an_active_run_one_is_submitted(driver: Driver, losses: tuple[str, ...], status: str) -> None:
    server = Server(*losses, status="done" if status == "missing" else status)
    if status == "missing":
        server.run = {}
    run = driver.run(flow(driver), server.script())
    assert (run.id, run.marker, server.submitted) == ("new-1", "drawn", 1)


def test_a_finished_run_that_carries_the_marker_is_returned(driver: Driver) -> None:
    server = Server(status="done", configuration_path="mine")
    assert driver.run(flow(driver, marker="mine"), server.script()).id == "id-1"
    assert server.submitted == 0


def test_a_lost_update_of_a_run_that_ended_since_is_not_submitted(driver: Driver) -> None:
    server = Server("after")
    server.before_apply = lambda: server.run.update(status="running")

    def ended(body: dict[str, Any]) -> Any:
        if server.run["deployment_num"]:
            server.run["status"] = "terminated"
        return reply(server.run)

    script = Script(runs__get=[ended], runs__get_plan=[server.plan], runs__apply=[server.apply])
    run = driver.run(flow(driver), script)
    assert (run.id, server.submitted) == ("id-1", 0)


@pytest.mark.parametrize("reports_changes", [True, False])
def test_changes_that_need_a_new_run_are_refused_and_all_are_named(
    driver: Driver, reports_changes: bool
) -> None:
    server = Server(reports_changes=reports_changes)
    spec = SPEC | {
        "configuration": SPEC["configuration"] | {"max_duration": "1h", "retry": True},
        "profile": {"name": "default", "max_price": 1.0},
        "ssh_key_pub": "other",
    }
    script = server.script()
    if not reports_changes:
        script.answers["runs/apply"] = [refusal("Cannot override active run. Stop the run first.")]
    with pytest.raises(RunNotUpdatableError) as caught:
        driver.run(flow(driver, spec), script)
    assert set(caught.value.changes) == {"max_duration", "retry", "profile.max_price", "the SSH key"}
    assert "Run train is active, and what would change needs a new run: " in caught.value.message
    assert "http://server/projects/main/runs/id-1" in caught.value.message
    assert "A" not in caught.value.changes
    assert server.run["deployment_num"] == 0


def test_a_run_that_is_stopping_is_not_updated(driver: Driver) -> None:
    server = Server(status="terminating")
    with pytest.raises(RunNotUpdatableError, match=r"Run train is stopping .* Apply again when it has ended"):
        driver.run(flow(driver), server.script())
    assert server.run["deployment_num"] == 0


def test_after_a_faster_update_by_another_client_the_plan_is_made_again(driver: Driver) -> None:
    server = Server()

    def faster() -> None:
        server.before_apply = lambda: None
        configuration = server.run["run_spec"]["configuration"] | {"port": 81}
        server.run["run_spec"] = server.run["run_spec"] | {"configuration": configuration}

    server.before_apply = faster
    script = server.script()
    assert driver.run(flow(driver), script).env == {"A": "2"}
    assert script.paths().count("runs/apply") == 2
    assert server.run["deployment_num"] == 1


def test_gives_up_on_a_run_that_changes_before_every_update(driver: Driver) -> None:
    server = Server()

    def faster() -> None:
        configuration = server.run["run_spec"]["configuration"]
        server.run["run_spec"] = server.run["run_spec"] | {
            "configuration": configuration | {"port": configuration["port"] + 1}
        }

    server.before_apply = faster
    script = server.script()
    with pytest.raises(RequestRejectedError, match="Resource has been changed"):
        driver.run(flow(driver), script)
    assert script.paths().count("runs/apply") == 5


def test_a_refusal_of_the_request_itself_is_raised_with_the_servers_message(driver: Driver) -> None:
    script = Server().script()
    script.answers["runs/apply"] = [refusal("Gateway g does not exist")]
    with pytest.raises(RequestRejectedError, match="Gateway g does not exist"):
        driver.run(flow(driver), script)
    assert script.paths().count("runs/apply") == 1


def test_a_run_that_another_client_submits_in_between_is_updated(driver: Driver) -> None:
    server = Server(status="done")

    def faster() -> None:
        if server.run["id"] == "id-1":
            server.run = server.new(
                {**server.run["run_spec"], "configuration_path": "theirs"}, "submitted", "id-2"
            )

    server.before_apply = faster
    run = driver.run(flow(driver), server.script())
    assert (run.id, run.marker, run.env, server.submitted) == ("id-2", "theirs", {"A": "2"}, 0)


def test_a_run_that_dstacks_client_named_in_its_configuration_keeps_that_name(driver: Driver) -> None:
    server = Server(configuration=CONFIGURATION | {"name": "train"})
    script = server.script()
    assert driver.run(flow(driver), script).deployment == 1
    assert script.bodies("runs/apply")[0]["plan"]["run_spec"]["configuration"]["name"] == "train"


def test_gives_up_after_the_budget_when_every_update_is_lost(driver: Driver) -> None:
    script = Server().script()
    script.answers["runs/apply"] = [LOST]
    with pytest.raises(ServerUnreachableError):
        driver.run(flow(driver), script)
    assert driver.clock.now - 1000 <= 31


def test_values_of_the_run_are_in_no_error_and_no_repr(driver: Driver) -> None:
    from dstack_core._wire.updates import parse_resource

    server = Server(configuration=CONFIGURATION | {"env": {"TOKEN": "s3cret"}, "max_duration": 1})
    with pytest.raises(RunNotUpdatableError) as caught:
        driver.run(flow(driver), server.script())
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(parse_resource(server.run))


def test_without_a_marker_a_taken_name_is_not_blamed_on_another_owner(driver: Driver) -> None:
    from dstack_core._flow.submit import submit

    server = Server()
    budget = RetryBudget(30, driver.clock)
    steps = submit(Api("http://server", "main"), SPEC, budget, replace_finished=True)
    with pytest.raises(RunNameTakenError, match="expected a name that is free, got 'train'") as caught:
        driver.run(retrying(steps, budget), server.script())
    assert "another owner" not in str(caught.value)
