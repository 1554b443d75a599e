"""The attempt of a job that belongs to an execution: an existing run is adopted, waited for or followed by the next."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core.errors import ServerUnreachableError
from dstack_core.integration.attempts import Attempt, _choose
from dstack_core.integration.names import AttemptNames, RunRef
from tests.core.scripted import LOST, MISSING, Driver, Script, reply, run_json

STEM = "engine:job/7"
GENERATED = AttemptNames("job-7", STEM)
CHOSEN = AttemptNames("job-7", STEM, "train")


def session(driver: Driver) -> Operations:
    return Operations(Api("http://server", "main"), 30.0, clock=driver.clock, wall_clock=driver.clock)


def choose(
    driver: Driver, script: Script, names: AttemptNames = GENERATED, budget: float = 30.0
) -> tuple[Any, Attempt]:
    attempt = Attempt(names.ref(1))
    return driver.run(_choose(session(driver), names, attempt, budget), script), attempt


def run(status: str, number: int = 1, **more: Any) -> Any:
    return reply(run_json(status, marker=f"{STEM}/{number}", **more))


def test_names_and_markers_of_attempts() -> None:
    assert GENERATED.ref(1) == RunRef("job-7", f"{STEM}/1", generated=True)
    assert GENERATED.ref(3) == RunRef("job-7-3", f"{STEM}/3", generated=True)
    assert CHOSEN.ref(2) == RunRef("train", f"{STEM}/2", generated=False)
    assert GENERATED.number_of(f"{STEM}/12") == 12
    assert [GENERATED.number_of(other) for other in (None, "", f"{STEM}/x", "other/1", STEM)] == [None] * 5


def test_without_a_run_the_first_attempt_is_submitted(driver: Driver) -> None:
    script = Script(runs__get=[MISSING])
    found, attempt = choose(driver, script)
    assert found is None
    assert attempt == Attempt(GENERATED.ref(1), is_chosen=True)
    assert script.paths() == ["runs/get"]


@pytest.mark.parametrize("status", ["running", "done", "a-new-status"])
def test_an_active_or_successful_run_is_adopted(driver: Driver, status: str) -> None:
    script = Script(runs__get=[run(status)])
    found, attempt = choose(driver, script)
    assert found.id == "id-1"
    assert attempt == Attempt(GENERATED.ref(1), "id-1", is_chosen=True, is_adopted=True)
    assert script.paths() == ["runs/get"]


@pytest.mark.parametrize("status", ["failed", "terminated"])
def test_an_unsuccessful_run_is_followed_by_the_next_attempt(driver: Driver, status: str) -> None:
    script = Script(runs__get=[run(status), run("failed", 2), MISSING])
    found, attempt = choose(driver, script)
    assert found is None
    assert attempt == Attempt(GENERATED.ref(3), is_chosen=True)
    assert [body["run_name"] for body in script.bodies("runs/get")] == ["job-7", "job-7-2", "job-7-3"]


def test_a_stopping_run_is_waited_for_and_not_adopted(driver: Driver) -> None:
    script = Script(runs__get=[run("terminating"), run("terminating"), run("terminated"), MISSING])
    found, attempt = choose(driver, script)
    assert found is None
    assert attempt.ref == GENERATED.ref(2)
    assert driver.clock.slept == [2.0, 2.0]


def test_a_name_that_the_user_chose_is_kept_in_the_next_attempt(driver: Driver) -> None:
    script = Script(runs__get=[run("failed", name="train")])
    found, attempt = choose(driver, script, CHOSEN)
    assert found is None
    assert attempt == Attempt(CHOSEN.ref(2), is_chosen=True)
    assert script.paths() == ["runs/get"]


UPGRADED = AttemptNames("etl-train-1", STEM, former_base="job-7")


def test_a_run_that_an_earlier_version_named_is_adopted_for_one_request_more(driver: Driver) -> None:
    script = Script(runs__get=[MISSING, run("running", name="job-7")])
    found, attempt = choose(driver, script, UPGRADED)
    assert found.name == "job-7"
    assert attempt == Attempt(RunRef("job-7", f"{STEM}/1", True), "id-1", is_chosen=True, is_adopted=True)
    assert [body["run_name"] for body in script.bodies("runs/get")] == ["etl-train-1", "job-7"]


def test_a_failed_run_of_an_earlier_version_is_followed_by_an_attempt_with_todays_name(
    driver: Driver,
) -> None:
    failed = run("failed", name="job-7")
    script = Script(runs__get=[MISSING, run("terminating", name="job-7"), failed, MISSING, MISSING])
    found, attempt = choose(driver, script, UPGRADED)
    assert found is None
    assert attempt == Attempt(UPGRADED.ref(2), is_chosen=True)
    asked = [body["run_name"] for body in script.bodies("runs/get")]
    assert asked == ["etl-train-1", "job-7", "job-7", "etl-train-1-2", "job-7-2"]


def test_a_run_with_todays_name_needs_no_second_request(driver: Driver) -> None:
    script = Script(runs__get=[run("running", name="etl-train-1")])
    found, attempt = choose(driver, script, UPGRADED)
    assert (found.name, attempt.ref) == ("etl-train-1", UPGRADED.ref(1))
    assert len(script.paths()) == 1


def test_a_run_of_another_owner_is_handled_by_the_submission(driver: Driver) -> None:
    found, attempt = choose(driver, Script(runs__get=[reply(run_json(marker="another"))]), CHOSEN)
    assert found is None
    assert attempt == Attempt(CHOSEN.ref(1), is_chosen=True)


def test_an_unreachable_server_is_retried_within_the_budget(driver: Driver) -> None:
    found, attempt = choose(driver, Script(runs__get=[LOST, LOST, run("running")]))
    assert found.id == "id-1"
    attempts: list[Attempt] = []
    with pytest.raises(ServerUnreachableError):
        attempts.append(choose(driver, Script(runs__get=[LOST]), budget=5.0)[1])
    assert attempt.is_adopted


def test_an_interrupted_caller_has_the_run_that_was_seen_last(driver: Driver) -> None:
    attempt = Attempt(GENERATED.ref(1))
    script = Script(runs__get=[run("failed"), run("terminating", 2, run_id="id-2"), LOST])
    with pytest.raises(ServerUnreachableError):
        driver.run(_choose(session(driver), GENERATED, attempt, 5.0), script)
    assert (attempt.ref, attempt.run_id, attempt.is_chosen) == (GENERATED.ref(2), "id-2", False)
