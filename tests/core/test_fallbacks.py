"""Fallbacks: a job moves to other machines by runs of its own, of which one at most is alive."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import Client, ConfigurationError, LogLines, Outcome, RunFinished
from dstack_core.integration import (
    Attempt,
    AttemptNames,
    Fallbacks,
    RunRef,
    afollow_steps,
    anewest_step,
    choose_attempt,
    follow_steps,
    newest_step,
    step_ref,
    stop_run,
)
from dstack_core.local import LocalServer, VirtualTime

REF = RunRef("train", "plain:nightly/1")
WORK = "echo began; sleep 600; echo ended"
SPOT = {"spot_policy": "spot"}
ON_DEMAND = Fallbacks([{"spot_policy": "on-demand", "survive": None}, {"max_price": 50.0}])


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


def task(command: str = WORK) -> dstack.Task:
    return dstack.Task(commands=[command])


def followed(client: Client, **given: Any) -> tuple[list[tuple[int, str]], Outcome, Attempt]:
    """Follow a job to its end; return its lines with the number of their attempt."""
    attempt, lines, outcomes = Attempt(REF), [], []
    arguments: dict[str, Any] = {
        "configuration": task(),
        "fallbacks": ON_DEMAND,
        "options": SPOT,
        "poll_interval": 5,
        **given,
    }
    for event in follow_steps(client, attempt=attempt, **arguments):
        if isinstance(event, LogLines):
            lines += [(event.attempt, line) for line in event.lines]
        if isinstance(event, RunFinished):
            outcomes.append(event.outcome)
    (outcome,) = outcomes
    return lines, outcome, attempt


def submitted(server: LocalServer) -> list[tuple[str, str]]:
    return [(run.name, run.marker) for run in server.runs]


def spot_policies(server: LocalServer) -> list[Any]:
    return [run.configuration["spot_policy"] for run in server.runs]


def test_after_an_interruption_a_job_moves_to_on_demand(server: LocalServer, client: Client) -> None:
    server.scenarios.interrupt_after(10)
    ends: list[tuple[str, str]] = []
    lines, outcome, attempt = followed(client, on_next=lambda end, ref: ends.append((end.category, ref.name)))
    assert outcome.succeeded
    assert lines == [(0, "began"), (1, "began"), (1, "ended")]
    assert submitted(server) == [("train", REF.marker), ("train-s2", f"{REF.marker}/step2")]
    assert spot_policies(server) == ["spot", "on-demand"]
    assert ends == [("spot.interrupted", "train-s2")]
    assert [(one.number, one.reason) for one in outcome.attempts] == [
        (1, "interrupted_by_no_capacity"),
        (2, "done_by_runner"),
    ]
    # The cost is that of both runs.
    runs = [client.runs.get(run.name) for run in server.runs]
    assert outcome.cost == pytest.approx(sum(run.cost for run in runs if run is not None), abs=1e-4)
    assert (attempt.ref.name, attempt.run_id) == ("train-s2", outcome.run_id)
    assert Outcome.from_dict(outcome.to_dict()) == outcome


def test_what_a_step_survives_comes_before_the_next_step(server: LocalServer, client: Client) -> None:
    server.scenarios.interrupt_after(10, times=9)
    options = {**SPOT, "survive": {"times": 1}}
    fallbacks = Fallbacks([{"survive": None}])
    _, outcome, _ = followed(client, options=options, fallbacks=fallbacks)
    assert outcome.category == "spot.interrupted"
    assert [run.name for run in server.runs] == ["train", "train-s2"]
    assert len(server.runs[0].job_reasons) >= 2
    assert len(server.runs[1].job_reasons) == 1
    numbers = [one.number for one in outcome.attempts]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(run.finished for run in server.runs)


def test_a_job_that_succeeded_is_found_and_one_that_fails_by_itself_has_one_run(
    server: LocalServer, client: Client
) -> None:
    for _ in range(2):
        _, outcome, _ = followed(client)
        assert outcome.succeeded
        assert submitted(server) == [("train", REF.marker)]
    attempt = Attempt(RunRef("other", "plain:nightly/2"))
    for event in follow_steps(client, task("exit 3"), attempt, ON_DEMAND, SPOT, poll_interval=5):
        last = event
    assert isinstance(last, RunFinished)
    assert (last.outcome.exit_status, len(server.runs)) == (3, 2)


def test_an_exit_status_leads_to_a_step(server: LocalServer, client: Client) -> None:
    work = 'test "$SIZE" = large || exit 137'
    fallbacks = Fallbacks([{"env": {"SIZE": "medium"}}, {"env": {"SIZE": "large"}}], on_exit={137: "next"})
    _, outcome, _ = followed(client, configuration=task(work), fallbacks=fallbacks, options={})
    assert outcome.succeeded
    assert [run.name for run in server.runs] == ["train", "train-s2", "train-s3"]
    assert [one.exit_status for one in outcome.attempts][:2] == [137, 137]


def test_an_exit_status_can_skip_a_step_and_none_is_repeated(server: LocalServer, client: Client) -> None:
    fallbacks = Fallbacks([{"max_price": 50.0}, {"max_price": 60.0}], on_exit={137: 3})
    _, outcome, _ = followed(client, configuration=task("exit 137"), fallbacks=fallbacks, options={})
    assert (outcome.category, outcome.run_name) == ("user.out_of_memory", "train-s3")
    assert [run.name for run in server.runs] == ["train", "train-s3"]
    # Another process finds them, and submits nothing.
    assert newest_step(client, REF, fallbacks) == step_ref(REF, 3)
    _, again, _ = followed(client, configuration=task("exit 137"), fallbacks=fallbacks, options={})
    assert (again, len(server.runs)) == (outcome, 2)


def test_another_process_takes_over_at_any_moment(server: LocalServer, client: Client) -> None:
    """Leave after each event in turn; the next process continues with what that event stored, or without."""
    server.scenarios.interrupt_after(10)
    lines: list[tuple[int, str]] = []
    progress = None
    for _ in range(40):
        for event in follow_steps(client, task(), Attempt(REF), ON_DEMAND, SPOT, progress, poll_interval=5):
            progress = dstack.Progress.from_dict(event.progress.to_dict())
            if isinstance(event, LogLines):
                lines += [(event.attempt, line) for line in event.lines]
            break
        if isinstance(event, RunFinished):
            break
    assert isinstance(event, RunFinished)
    assert event.outcome.succeeded
    assert lines == [(0, "began"), (1, "began"), (1, "ended")]
    assert [one.number for one in event.outcome.attempts] == [1, 2]
    # Without the progress all lines come again, and nothing is submitted.
    again, outcome, _ = followed(client)
    assert again == lines
    assert outcome.attempts == event.outcome.attempts
    assert len(server.runs) == 2


def test_the_same_machines_again_after_one_was_lost(server: LocalServer, client: Client) -> None:
    """dstack ends a run whose on-demand machine is lost; an empty fallback begins again."""
    server.scenarios.lose_machine(10)
    given = {"fallbacks": Fallbacks([{}]), "options": {"spot_policy": "on-demand", "max_price": 50.0}}
    lines, outcome, attempt = followed(client, **given)
    assert lines == [(0, "began"), (1, "began"), (1, "ended")]
    assert [each.reason for each in outcome.attempts][-1] == "done_by_runner"
    assert (attempt.ref.name, len(outcome.attempts)) == ("train-s2", 2)
    first, second = server.runs
    assert first.configuration["max_price"] == second.configuration["max_price"] == 50.0


def test_a_process_that_was_lost_between_two_steps(server: LocalServer, client: Client) -> None:
    server.scenarios.interrupt_after(10)

    class Lost(BaseException):
        pass

    def lose(outcome: Outcome, ref: RunRef) -> None:
        raise Lost

    with pytest.raises(Lost):
        followed(client, on_next=lose)
    assert len(server.runs) == 1
    assert newest_step(client, REF, ON_DEMAND) == REF
    _, outcome, _ = followed(client)
    assert outcome.succeeded
    assert len(server.runs) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lost_request_or_reply_submits_no_second_run_of_a_step(
    server: LocalServer, client: Client, when: Any
) -> None:
    server.scenarios.interrupt_after(10)
    lines, outcome, _ = followed(
        client, on_next=lambda end, ref: server.faults.add("/runs/apply", times=2, drop=when)
    )
    assert outcome.succeeded
    assert lines == [(0, "began"), (1, "began"), (1, "ended")]
    assert [run.name for run in server.runs] == ["train", "train-s2"]


def test_two_processes_at_once_submit_each_step_once(server: LocalServer) -> None:
    server.scenarios.interrupt_after(10)

    async def one(client: dstack.AsyncClient) -> Outcome:
        async for event in afollow_steps(client, task(), Attempt(REF), ON_DEMAND, SPOT, poll_interval=5):
            if isinstance(event, RunFinished):
                return event.outcome
        raise AssertionError("no outcome")

    async def both() -> tuple[tuple[Outcome, Outcome], RunRef]:
        target: dict[str, Any] = {
            "server_url": server.url,
            "project_name": server.project,
            "user_token": server.token,
        }
        async with dstack.AsyncClient(**target) as client, dstack.AsyncClient(**target) as other:
            outcomes = await asyncio.gather(one(client), one(other))
            return outcomes, await anewest_step(client, REF, ON_DEMAND)

    (first, second), newest = asyncio.run(both())
    assert first.succeeded
    assert first.run_id == second.run_id
    assert [one.number for one in first.attempts] == [1, 2]
    assert submitted(server) == [("train", REF.marker), ("train-s2", f"{REF.marker}/step2")]
    assert newest == step_ref(REF, 2)


def test_a_stop_ends_the_newest_step_and_no_other_follows(
    time: VirtualTime, server: LocalServer, client: Client
) -> None:
    server.scenarios.interrupt_after(10)
    attempt = Attempt(REF)
    for event in follow_steps(client, task(), attempt, ON_DEMAND, SPOT, poll_interval=5):
        if isinstance(event, LogLines) and attempt.ref.name == "train-s2":
            break
    found = newest_step(client, REF, ON_DEMAND)
    assert found == attempt.ref
    stop_run(client, found, timeout=60, until="ended", log=logging.getLogger("test"))
    _, outcome, _ = followed(client)
    assert (outcome.reason, len(server.runs)) == ("stopped_by_user", 2)
    assert all(run.finished for run in server.runs)


def test_max_cost_counts_all_steps(server: LocalServer, client: Client) -> None:
    server.scenarios.interrupt_after(600)
    options = {"spot_policy": "spot", "max_cost": 0.5}
    _, outcome, _ = followed(client, configuration=task("sleep 9000"), options=options)
    assert outcome.category == "limit.max_cost"
    assert 0.45 < outcome.cost < 0.6
    first = client.runs.get("train")
    assert first is not None
    assert 0.1 < first.cost < 0.4
    left = float(server.runs[-1].configuration["env"]["DSTACK_MAX_COST"])
    assert left == pytest.approx(0.5 - first.cost, abs=1e-3)


def test_a_step_that_the_rest_of_max_cost_does_not_pay_for_is_not_submitted(time: VirtualTime) -> None:
    prices = {"aws/us-east-1": 1.2, "gcp/us-west1": 3600.0}
    with LocalServer(regions=prices) as server, server.client() as client:
        options = {"backends": ["aws"], "max_cost": 1.0}
        fallbacks = Fallbacks([{"backends": ["gcp"]}], on_exit={137: "next"})
        _, outcome, attempt = followed(
            client, configuration=task("exit 137"), fallbacks=fallbacks, options=options
        )
        assert (outcome.category, len(server.runs)) == ("user.out_of_memory", 1)
        assert "; no further step: max_cost: expected more than 5.00 USD" in outcome.message
        assert not attempt.may_appear


def test_a_deleted_run_is_not_submitted_again_by_a_process_that_takes_over(
    server: LocalServer, client: Client
) -> None:
    event = next(follow_steps(client, task("true"), Attempt(REF), ON_DEMAND, SPOT, poll_interval=5))
    run = client.runs.get("train")
    assert run is not None
    run.wait(poll_interval=5)
    client.runs.delete("train")
    with pytest.raises(dstack.RunNotFoundError, match="no longer exists"):
        followed(client, progress=event.progress)
    assert client.runs.get("train") is None


def test_all_steps_share_the_directory_of_the_checkpoints(server: LocalServer, client: Client) -> None:
    configuration = dstack.Task(commands=["exit 137"], volumes=["/nfs:/data"])
    survive = {"survive": {"checkpoint": "/data"}}
    fallbacks = Fallbacks([{"max_price": 50.0}], on_exit={137: "next"})
    followed(client, configuration=configuration, fallbacks=fallbacks, options=survive)
    directories = [run.configuration["env"]["DSTACK_CHECKPOINT"] for run in server.runs]
    assert len(directories) == 2
    assert len(set(directories)) == 1
    # So do those of a job whose marker counts no tries.
    for _ in follow_steps(client, configuration, Attempt(RunRef("mine", "mine")), fallbacks, survive):
        pass
    assert {run.configuration["env"]["DSTACK_CHECKPOINT"] for run in server.runs[2:]} == {"/data/mine"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"options": []}, r"^fallbacks: expected a list of dicts of submit options .*, got \[\]"),
        ({"options": [None]}, r"^fallbacks: expected a list of dicts"),
        ({"options": [{"max_price": 2}], "on_exit": {0: "next"}}, r"^on_exit: expected exit statuses from 1"),
        (
            {"options": [{"max_price": 2}], "on_exit": {137: 3}},
            r'^on_exit: expected "next" or .* 2 to 2, for 137',
        ),
        ({"options": [{"max_price": 2}], "on_exit": {137: True}}, r'^on_exit: expected "next" or the number'),
    ],
)
def test_wrong_fallbacks_are_one_error(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Fallbacks(**given)


def test_a_wrong_option_of_a_later_step_is_an_error_before_anything_is_submitted(
    server: LocalServer, client: Client
) -> None:
    with pytest.raises(ConfigurationError, match=r"^fallbacks\[0\]: spot_policy: expected"):
        followed(client, fallbacks=Fallbacks([{"spot_policy": "cheap"}]))
    with pytest.raises(TypeError, match="spot"):
        followed(client, fallbacks=Fallbacks([{"spot": True}]))
    with pytest.raises(
        ConfigurationError, match=r"^progress: expected that of run train or one of its steps"
    ):
        followed(client, progress=dstack.Progress("other"))
    assert server.runs == []


def test_the_name_of_a_step_fits() -> None:
    assert step_ref(REF, 1) == REF
    assert step_ref(REF, 2) == RunRef("train-s2", "plain:nightly/1/step2")
    long, other = (RunRef("a" * 40 + end, "plain:x/1", generated=True) for end in "bc")
    names = {step_ref(ref, number).name for ref in (long, other) for number in (2, 10)}
    assert len(names) == 4
    assert all(len(name) <= 41 for name in names)
    assert step_ref(long, 2).generated


NAMES = AttemptNames("train", "plain:nightly")


def chosen(client: Client, names: AttemptNames = NAMES, max_cost: float | None = None) -> tuple[Any, Attempt]:
    attempt = Attempt(names.ref(1))
    found = choose_attempt(client, names, attempt, fallbacks=ON_DEMAND, max_cost=max_cost)
    return found, attempt


def leave(client: Client, until_run: str, **given: Any) -> None:
    """Follow a job until a line of that run, and leave it."""
    arguments: dict[str, Any] = {"options": SPOT, "poll_interval": 5, **given}
    for event in follow_steps(client, task(), Attempt(NAMES.ref(1)), ON_DEMAND, **arguments):
        if isinstance(event, LogLines) and event.progress.run_name == until_run:
            return


@pytest.mark.parametrize("ends", [False, True], ids=["active", "succeeded"])
def test_another_execution_adopts_the_newest_step(server: LocalServer, client: Client, ends: bool) -> None:
    server.scenarios.interrupt_after(10)
    leave(client, "none" if ends else "train-s2")
    found, attempt = chosen(client)
    assert found.name == "train-s2"
    assert (attempt.ref, attempt.first, attempt.step) == (step_ref(NAMES.ref(1), 2), NAMES.ref(1), 2)
    assert (attempt.run_id, attempt.is_adopted) == (found.id, True)
    assert (found.outcome() is not None) == ends


def test_another_execution_submits_the_step_that_follows(server: LocalServer, client: Client) -> None:
    server.scenarios.interrupt_after(10)

    def lose(outcome: Outcome, ref: RunRef) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave(client, "none", on_next=lose)
    found, attempt = chosen(client)
    assert (found, attempt.ref, attempt.step) == (None, step_ref(NAMES.ref(1), 2), 2)
    assert (attempt.is_chosen, attempt.run_id) == (True, None)
    # What the first run has cost is all that the steps may cost: the job begins again.
    found, attempt = chosen(client, max_cost=1e-9)
    assert (found, attempt.ref, attempt.first, attempt.step) == (None, NAMES.ref(2), None, 1)


@pytest.mark.parametrize("fixed", [None, "train"])
def test_after_the_last_step_and_after_a_stop_the_job_begins_again(
    server: LocalServer, client: Client, fixed: str | None
) -> None:
    names = AttemptNames("train", "plain:nightly", fixed)
    server.scenarios.interrupt_after(10)
    leave(client, "train-s2")
    stop_run(client, step_ref(NAMES.ref(1), 2), timeout=60, until="ended", log=logging.getLogger("test"))
    found, attempt = chosen(client, names)
    assert (found, attempt.ref, attempt.first, attempt.step) == (None, names.ref(2), None, 1)


def test_a_step_that_is_stopping_is_waited_for(server: LocalServer, client: Client) -> None:
    server.scenarios.interrupt_after(10)
    leave(client, "train-s2")
    run = client.runs.get("train-s2")
    assert run is not None
    run.stop()
    found, attempt = chosen(client)
    assert (found, attempt.ref) == (None, NAMES.ref(2))
    assert all(each.finished for each in server.runs)
