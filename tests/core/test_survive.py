"""``survive``: dstack begins the next attempt of a run, within the limits that any follower enforces."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import Client, ConfigurationError, LogLines, Outcome, RunInterruptedError, Survive
from dstack_core.local import LocalServer, VirtualTime

WORK = "echo began; sleep 600; echo ended"


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


def submit(client: Client, command: str = WORK, **options: Any) -> dstack.Run:
    task = dstack.Task(commands=[command], name="train")
    return client.runs.submit(task, **{"spot_policy": "spot", "survive": "4h", **options})


def followed(run: dstack.Run) -> tuple[list[tuple[int, str]], Outcome]:
    """Return each line with the number of its attempt, and the outcome."""
    lines: list[tuple[int, str]] = []
    for event in run.follow(poll_interval=5):
        if isinstance(event, LogLines):
            lines += [(event.attempt, line) for line in event.lines]
        if isinstance(event, dstack.RunFinished):
            return lines, event.outcome
    raise AssertionError("no outcome")


def test_a_run_survives_interruptions_and_each_line_comes_once_with_its_attempt(
    server: LocalServer, client: Client
) -> None:
    server.scenarios.interrupt_after(10, times=2)
    lines, outcome = followed(submit(client))
    assert outcome.succeeded
    assert lines == [(0, "began"), (1, "began"), (2, "began"), (2, "ended")]
    assert [(one.number, one.reason, one.spot) for one in outcome.attempts] == [
        (1, "interrupted_by_no_capacity", True),
        (2, "interrupted_by_no_capacity", True),
        (3, "done_by_runner", False),
    ]
    assert all(one.instance and one.duration and one.cost > 0 for one in outcome.attempts)
    assert sum(one.cost for one in outcome.attempts) == pytest.approx(outcome.cost, abs=1e-3)
    assert Outcome.from_dict(outcome.to_dict()) == outcome
    assert len(server.runs) == 1


def test_a_run_survives_that_there_is_no_capacity_after_an_interruption(
    time: VirtualTime, server: LocalServer, client: Client
) -> None:
    server.scenarios.interrupt_after(10)
    run = submit(client)
    time.sleep(20)
    server.scenarios.capacity_after(1800)
    assert run.wait(poll_interval=10).succeeded
    # What found no machine is not listed.
    assert [one.reason for one in run.wait().attempts] == ["interrupted_by_no_capacity", "done_by_runner"]


def test_more_losses_than_allowed_end_the_run(server: LocalServer, client: Client) -> None:
    server.scenarios.interrupt_after(10, times=9)
    run = submit(client, survive=Survive(duration="4h", times=2))
    _, outcome = followed(run)
    assert (str(outcome.status), outcome.category) == ("failed", "spot.interrupted")
    assert outcome.message == (
        "failed: its machine was taken away (spot interruption or no capacity) "
        "(Instance is unreachable; survive allows 2 of them)"
    )
    assert sum(one.reason == "interrupted_by_no_capacity" for one in outcome.attempts) == 3
    assert server.runs[0].finished
    # Another process sees the same end.
    with server.client() as other:
        found = other.runs.get("train")
        assert found is not None
        with pytest.raises(RunInterruptedError, match="survive allows 2 of them"):
            found.wait().raise_for_status()


def test_the_duration_counts_from_the_submission_on(
    time: VirtualTime, server: LocalServer, client: Client
) -> None:
    server.scenarios.interrupt_after(1000, times=9)
    _, outcome = followed(submit(client, "sleep 1200", survive={"duration": "30m"}))
    assert outcome.reason == "interrupted_by_no_capacity"
    assert "the duration of survive has passed" in outcome.message
    # The second attempt may end, although it does so after the 30 minutes; the third does not begin.
    assert 2 <= len(outcome.attempts) <= 3
    assert 2200 < time.passed < 2700
    assert server.runs[0].finished


def test_a_stop_is_still_a_stop_and_a_failing_command_still_fails(
    server: LocalServer, client: Client
) -> None:
    run = submit(client, survive={"times": 1})
    run.stop(until="ended", timeout=60)
    assert run.wait().reason == "stopped_by_user"
    outcome = submit(client, "exit 137").wait(poll_interval=1)
    assert (outcome.category, len(outcome.attempts)) == ("user.out_of_memory", 1)


def test_the_async_client_enforces_the_same_limits(server: LocalServer) -> None:
    server.scenarios.interrupt_after(10, times=9)

    async def followed_async() -> Outcome:
        target: dict[str, Any] = {
            "server_url": server.url,
            "project_name": server.project,
            "user_token": server.token,
        }
        async with dstack.AsyncClient(**target) as client:
            task = dstack.Task(commands=[WORK], name="train")
            run = await client.runs.submit(task, spot_policy="spot", survive={"times": 1})
            return await run.wait(poll_interval=5)

    outcome = asyncio.run(followed_async())
    assert (outcome.reason, len(server.runs)) == ("interrupted_by_no_capacity", 1)
    assert "survive allows 1 of them" in outcome.message
    assert server.runs[0].finished


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("4h", {"on_events": ["interruption", "no-capacity"], "duration": 14400}),
        (True, {"on_events": ["interruption", "no-capacity"], "duration": 86400}),
        (Survive(events=["interruption"], duration=90), {"on_events": ["interruption"], "duration": 90}),
        (None, None),
        (False, None),
    ],
)
def test_the_forms_of_survive(client: Client, server: LocalServer, given: Any, sent: Any) -> None:
    submit(client, "true", survive=given)
    assert server.runs[0].configuration.get("retry") == sent


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"survive": "0s"}, r"^survive\.duration: expected seconds above 0, .*, got '0s'"),
        ({"survive": "soon"}, r"^survive\.duration: expected seconds above 0, .*, got 'soon'"),
        ({"survive": {"times": 0}}, r"^survive\.times: expected a whole number of 1 or more, or None, got 0"),
        ({"survive": {"events": ["error"]}}, r'^survive\.events: expected a list of "interruption", .*error'),
        (
            {"survive": {"limit": "4h"}},
            r"^survive\.limit: there is no such field; expected one of duration, times, events, checkpoint\.$",
        ),
        (
            {"survive": {"durations": "4h"}},
            r"^survive\.durations: there is no such field; did you mean duration\?$",
        ),
        ({"survive": [4]}, r'^survive: expected a Survive, a duration such as "4h", .*, got \[4\]\.'),
        ({"retry_policy": True}, r"^survive: expected no retry_policy with it, got both\."),
    ],
)
def test_a_wrong_survive_is_one_error_before_anything_is_submitted(
    client: Client, server: LocalServer, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        submit(client, **options)
    assert server.runs == []


def test_a_retry_of_the_configuration_is_not_replaced(client: Client, server: LocalServer) -> None:
    task = dstack.Task.model_validate({"commands": ["true"], "retry": {"on_events": ["error"]}})
    with pytest.raises(ConfigurationError, match=r"^survive: expected no `retry` in the configuration"):
        client.runs.submit(task, survive="4h")
    assert server.runs == []
    off = dstack.Task.model_validate({"commands": ["true"], "retry": False})
    client.runs.submit(off, survive={"events": ["no-capacity"], "duration": 90})
    assert server.runs[0].configuration["retry"] == {"on_events": ["no-capacity"], "duration": 90}


def test_only_a_task_can_survive(client: Client) -> None:
    with pytest.raises(ConfigurationError, match=r"^survive: expected a task, got type 'service'"):
        client.runs.submit(dstack.Service(commands=["true"], port=80), survive="4h")
