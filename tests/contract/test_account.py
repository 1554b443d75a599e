"""The user, projects, backends, events and metrics, on both servers."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests

import dstack_core as dstack
from dstack_core._wire.plans import parse_plan
from dstack_core._wire.smaller_gpu import smaller_gpu
from tests.contract.conftest import Target

_EVENTS_SINCE = (0, 20, 0)


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
    assert [len(metric.values) for metric in run.metrics(limit=1) if metric.values] == [1] * len(metrics)


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


def test_the_plan_for_a_smaller_gpu_is_one_that_the_server_accepts(
    target: Target, client: dstack.Client
) -> None:
    # The run asks for what no machine has here: only its spec matters, as the server keeps it.
    resources = {"gpu": {"name": ["A100", "H100"], "memory": "80GB", "count": 1, "total_memory": "10GB.."}}
    run = client.runs.submit(target.task("true", resources=resources))
    gib = 2**30
    usage = dstack.Utilization(gpu_memory_peak=11 * gib, gpu_memory_total=80 * gib)
    url = f"{target.url}/api/project/{target.project}"
    member = {"Authorization": f"Bearer {target.token}"}

    def ask(path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"{url}/{path}", json=body, headers=member, timeout=60)

    found = smaller_gpu(ask("runs/get", {"run_name": run.name}).json(), usage)
    assert found is not None
    gpu = found.run_spec["configuration"]["resources"]["gpu"]
    assert gpu["memory"] == {"min": 14, "max": 79}
    assert "name" not in gpu
    plan = ask("runs/get_plan", {"run_spec": found.run_spec})
    assert plan.status_code == 200, plan.text
    assert parse_plan(plan.json()).offers == ()
    target.stop(run)


def test_an_offer_names_its_gpu(target: Target, client: dstack.Client) -> None:
    plan = client.runs.plan(target.task("true"))
    assert plan.offers
    assert all((offer.gpus > 0) == (offer.gpu_memory is not None) for offer in plan.offers)
