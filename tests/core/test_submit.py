"""A submit makes exactly one run, whatever gets lost (PROTOCOL 1.4)."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dstack_core._flow.retry import RetryBudget, retrying
from dstack_core._flow.steps import Flow
from dstack_core._flow.submit import submit
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import (
    AuthenticationError,
    ProtocolError,
    RequestRejectedError,
    RunNameTakenError,
    ServerUnreachableError,
)
from tests.core.scripted import LOST, MISSING, Driver, Script, recorded_reply, reply, run_json

SPEC = {"run_name": "train", "configuration_path": "mine", "configuration": {"type": "task"}}


def flow(
    driver: Driver, *, replace_finished: bool = True, look_first: bool = True, seconds: float = 30
) -> Flow[RunSnapshot]:
    api = Api("http://server", "main")
    budget = RetryBudget(seconds, driver.clock)
    steps = submit(api, SPEC, budget, replace_finished=replace_finished, look_first=look_first)
    return retrying(steps, budget)


class Server:
    """A server that, like a real one, refuses the second apply of a name."""

    def __init__(self, *losses: str) -> None:
        self.runs: list[dict[str, Any]] = []
        self.losses = list(losses)

    def get(self, body: dict[str, Any]) -> Any:
        return reply(self.runs[-1]) if self.runs else MISSING

    def apply(self, body: dict[str, Any]) -> Any:
        loss = self.losses.pop(0) if self.losses else ""
        if loss == "before":
            return LOST
        if loss.isdigit():
            return reply("Internal Server Error", int(loss))
        if self.runs:
            return recorded_reply("apply_same_active_noforce_0.22.5")
        self.runs.append(run_json("submitted", marker=body["plan"]["run_spec"]["configuration_path"]))
        return LOST if loss == "after" else reply(self.runs[-1])

    def script(self) -> Script:
        return Script(runs__get=[self.get], runs__apply=[self.apply])


@pytest.mark.parametrize(
    ("losses", "applies"),
    [
        ((), 1),
        (("before",), 2),
        (("after",), 1),
        (("before", "after"), 2),
        (("503", "before", "after"), 3),
        (("500",), 2),
    ],
)
@pytest.mark.parametrize("look_first", [True, False])
def test_one_run_whatever_is_lost(
    driver: Driver, losses: tuple[str, ...], applies: int, look_first: bool
) -> None:
    server = Server(*losses)
    script = server.script()
    run = driver.run(flow(driver, look_first=look_first), script)
    assert (run.name, run.marker, len(server.runs)) == ("train", "mine", 1)
    assert script.paths().count("runs/apply") == applies


def test_with_a_newly_drawn_marker_one_request_submits(driver: Driver) -> None:
    script = Server().script()
    assert driver.run(flow(driver, look_first=False), script).marker == "mine"
    assert script.paths() == ["runs/apply"]


@pytest.mark.parametrize("version", ["0.18.44", "0.19.40", "0.20.24", "0.21.5", "0.22.5"])
@pytest.mark.parametrize("text", ["apply_same_active_noforce", "apply_different_active_force"])
def test_the_servers_refusal_to_replace_an_active_run_is_a_taken_name(
    driver: Driver, version: str, text: str
) -> None:
    script = Script(
        runs__get=[reply(run_json("running", marker="theirs"))],
        runs__apply=[recorded_reply(f"{text}_{version}")],
    )
    with pytest.raises(
        RunNameTakenError,
        match=r"a name that is free, got .train.: a run of that name is active.*http://server",
    ):
        driver.run(flow(driver, look_first=False), script)
    assert script.paths() == ["runs/apply", "runs/get"]


def test_the_request_never_forces_nor_names_a_resource(driver: Driver) -> None:
    script = Server().script()
    driver.run(flow(driver), script)
    assert script.bodies("runs/apply") == [{"plan": {"run_spec": SPEC}, "force": False}]


@pytest.mark.parametrize("status", ["submitted", "running", "done", "failed", "terminating"])
def test_a_run_with_our_marker_is_returned_whatever_its_status(driver: Driver, status: str) -> None:
    script = Script(runs__get=[reply(run_json(status))])
    assert driver.run(flow(driver), script).raw_status == status
    assert script.paths() == ["runs/get"]


@pytest.mark.parametrize("status", ["pending", "running", "terminating"])
def test_an_active_run_of_another_owner_is_never_touched(driver: Driver, status: str) -> None:
    script = Script(runs__get=[reply(run_json(status, marker="theirs"))])
    with pytest.raises(
        RunNameTakenError,
        match=r"a name that is free, got .train.: a run of that name is active.*http://server",
    ):
        driver.run(flow(driver), script)
    assert script.paths() == ["runs/get"]


def test_a_finished_run_of_another_owner_is_replaced_only_where_allowed(driver: Driver) -> None:
    theirs = reply(run_json("done", marker="theirs"))
    script = Script(runs__get=[theirs], runs__apply=[reply(run_json("submitted", run_id="id-2"))])
    assert driver.run(flow(driver), script).id == "id-2"
    with pytest.raises(RunNameTakenError, match="ended as done"):
        driver.run(flow(driver, replace_finished=False), Script(runs__get=[theirs]))


@pytest.mark.parametrize("version", ["0.18.44", "0.19.40", "0.20.24", "0.21.5", "0.22.5"])
@pytest.mark.parametrize("text", ["apply_same_active_noforce", "apply_different_active_force"])
def test_when_another_submission_with_our_marker_was_faster_its_run_is_returned(
    driver: Driver, version: str, text: str
) -> None:
    script = Script(
        runs__get=[MISSING, reply(run_json("submitted"))], runs__apply=[recorded_reply(f"{text}_{version}")]
    )
    assert driver.run(flow(driver), script).marker == "mine"


def test_a_refusal_of_the_request_itself_is_raised_with_the_servers_message(driver: Driver) -> None:
    refusal = reply({"detail": [{"loc": ["body", "plan", "run_spec", "configuration", "TaskConfiguration", "nodez"],
                                 "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}]}, 422)  # fmt: skip
    script = Script(runs__get=[MISSING], runs__apply=[refusal])
    with pytest.raises(
        RequestRejectedError, match=r"configuration\.nodez: there is no such field; check its spelling"
    ):
        driver.run(flow(driver), script)
    assert script.paths() == ["runs/get", "runs/apply", "runs/get"]


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("Volume ['data'] not found", ". Create the volume in this project first, or correct `volumes`"),
        ("Gateway main does not exist", ". Create the gateway in this project first, or correct `gateway`"),
        ("The service requires a gateway", ""),
    ],
)
def test_something_missing_that_a_run_names_is_not_a_missing_run(driver: Driver, text: str, way: str) -> None:
    refusal = reply({"detail": [{"msg": text, "code": "resource_not_exists"}]}, 400)
    script = Script(runs__get=[MISSING], runs__apply=[refusal])
    with pytest.raises(RequestRejectedError, match=f"refused the request: {re.escape(text + way)}"):
        driver.run(flow(driver), script)


def test_a_refused_token_fails_at_once_before_anything_is_submitted(driver: Driver) -> None:
    script = Script(runs__get=[recorded_reply("error_403_bad_token_0.22.5")])
    with pytest.raises(AuthenticationError, match="http://server refused the token"):
        driver.run(flow(driver), script)
    assert script.paths() == ["runs/get"]


def test_gives_up_after_the_budget_on_a_server_that_never_answers(driver: Driver) -> None:
    script = Script(runs__get=[LOST])
    with pytest.raises(ServerUnreachableError, match=r"retry budget 30 s"):
        driver.run(flow(driver), script)
    assert 20 <= driver.clock.now - 1000 <= 30
    assert len(script.requests) > 3


def test_gives_up_after_the_budget_when_every_apply_is_lost(driver: Driver) -> None:
    script = Script(runs__get=[MISSING], runs__apply=[LOST])
    with pytest.raises(ServerUnreachableError):
        driver.run(flow(driver), script)
    assert driver.clock.now - 1000 <= 31


def test_the_error_after_malformed_replies_reports_that_the_run_was_sent(driver: Driver) -> None:
    malformed = reply({"unexpected": [1, 2, 3]})
    script = Script(runs__get=[MISSING, malformed], runs__apply=[malformed])
    with pytest.raises(ServerUnreachableError, match=r"Run 'train' was sent there"):
        driver.run(flow(driver), script)
    assert script.paths().count("runs/apply") == 1


def test_a_malformed_first_reply_is_a_protocol_error_and_nothing_is_submitted(driver: Driver) -> None:
    script = Script(runs__get=[reply({"unexpected": [1, 2, 3]})])
    with pytest.raises(ProtocolError):
        driver.run(flow(driver), script)
    assert script.paths().count("runs/apply") == 0
