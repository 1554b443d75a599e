"""The user, projects, backends, events and metrics, on both servers."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
import requests

import dstack_core as dstack
from tests.contract.conftest import Target

_EVENTS_SINCE = (0, 20, 0)
# The embedded server measures nothing and stores no secrets.
ON_THE_REAL_ONE = pytest.mark.parametrize(
    "target", [pytest.param("real", marks=pytest.mark.real)], indirect=True
)


def finished(target: Target, client: dstack.Client, *commands: str) -> dstack.Run:
    run = client.runs.submit(target.task(*commands))
    run.wait(target.timeout, poll_interval=target.poll_interval)
    return run


def test_the_user_and_its_project(target: Target, client: dstack.Client) -> None:
    user, project = client.user(), client.projects.get()
    assert (user.name, user.global_role) == ("admin", "admin")
    assert (project.name, project.owner.id) == (target.project, user.id)
    assert project.is_public is False
    assert [(member.user.id, member.role) for member in project.members] == [(user.id, "admin")]
    assert project.id in [listed.id for listed in client.projects.list()]
    assert client.projects.get(target.project) == project
    assert client.backends.list() == list(project.backends)
    assert target.token not in repr((user, project))
    with pytest.raises(dstack.ProjectNotFoundError, match="no project 'nope'"):
        client.projects.get("nope")


def test_events_cover_a_run_from_start_to_end(target: Target, client: dstack.Client) -> None:
    run = finished(target, client, "echo hello")
    if target.release < _EVENTS_SINCE:
        with pytest.raises(dstack.UnsupportedServerError, match=r"events: needs dstack >= 0\.20\.0, this"):
            run.events()
        return
    events = run.events()
    assert [event.recorded_at for event in events] == sorted(event.recorded_at for event in events)
    assert any(event.message.startswith("Run status changed ") for event in events)
    assert events[-1].message.endswith("-> DONE") or "unassigned" in events[-1].message
    assert {target["type"] for event in events for target in event.targets} >= {"run", "job"}
    assert run.events(limit=2) == events[-2:]
    assert abs(datetime.now(UTC) - events[-1].recorded_at) < timedelta(minutes=5)


def test_metrics_name_their_job(target: Target, client: dstack.Client) -> None:
    run = finished(target, client, "echo hello")
    for metric in run.metrics():
        assert len(metric.timestamps) == len(metric.values)
    with pytest.raises(dstack.RunNotFoundError, match=f"run {run.name}.* has no node 3 in replica 0"):
        run.metrics(node=3)


def test_a_followed_run_knows_how_busy_its_machine_was(target: Target, client: dstack.Client) -> None:
    run = client.runs.submit(target.task("echo started", "sleep 600"))
    deadline = time.monotonic() + target.timeout
    while not (metrics := run.metrics()):
        assert time.monotonic() < deadline, "no metrics"
        time.sleep(target.poll_interval)
    target.stop(run)
    measured = {"cpu_usage_percent", "memory_usage_bytes"}
    if target.release >= (0, 19, 0):
        measured.add("cpus_detected_num")
    assert measured <= {metric.name for metric in metrics}
    memory = metrics.get("memory_usage_bytes")
    assert memory is not None
    assert list(memory.timestamps) == sorted(memory.timestamps)
    assert memory.values[-1] > 100_000
    # The totals of servers before 0.19 are those of the machine.
    assert metrics.hardware.cpus is not None
    assert "<polyline" in run.metrics().plot().svg or "<circle" in run.metrics().plot().svg
    # The values of a job that has ended are still there, and a follower reads them at the end.
    *_, end = run.follow(utilization=True, poll_interval=target.poll_interval)
    assert isinstance(end, dstack.RunFinished)
    usage = end.outcome.utilization
    assert usage is not None
    assert usage.cpu_mean is not None
    assert usage.memory_peak is not None
    assert usage.memory_total is not None
    assert 100_000 < usage.memory_peak < usage.memory_total
    assert (usage.gpus, usage.gpu_mean, usage.advice) == (0, None, "")
    assert run.outcome() == end.outcome
    # Only what is new is read again: the server counts from that very value on and leaves it out.
    api = dstack.Client(**target.arguments())
    with api:
        again = run.metrics(limit=1)
    assert [len(metric.values) for metric in again] == [1] * len(again)


@ON_THE_REAL_ONE
def test_a_secret_of_the_project_is_filled_in_by_the_server(target: Target, client: dstack.Client) -> None:
    task = target.task('echo "$GREETING"', env={"GREETING": "${{ secrets.greeting }}"})
    if target.release < (0, 19, 17):
        with pytest.raises(dstack.UnsupportedServerError, match=r"secrets: needs dstack >= 0\.19\.17"):
            client.runs.submit(task)
        return
    body = {"name": "greeting", "value": "hello from a secret"}
    url = f"{target.url}/api/project/{target.project}/secrets/create_or_update"
    member = {"Authorization": f"Bearer {target.token}"}
    assert requests.post(url, json=body, headers=member, timeout=30).ok
    run = client.runs.submit(task)
    run.wait(target.timeout, poll_interval=target.poll_interval)
    assert b"".join(run.logs()) == b"hello from a secret\r\n"


def test_the_async_twin_does_the_same(target: Target, client: dstack.Client) -> None:
    async def go() -> tuple[dstack.User, dstack.Project, list[dstack.Project], list[dstack.Backend]]:
        async with target.async_client() as twin:
            return (
                await twin.user(),
                await twin.projects.get(),
                await twin.projects.list(),
                await twin.backends.list(),
            )

    assert asyncio.run(go()) == (
        client.user(),
        client.projects.get(),
        client.projects.list(),
        client.backends.list(),
    )
