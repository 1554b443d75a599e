"""Updates in place on the embedded server: exactly one for each request, whatever faults occur."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core.local import LocalServer
from dstack_core.local.states import JOB_FINISHED
from tests.local.support import Api, wait_until

FAULTS: list[dict[str, Any]] = [
    {"drop": "before"},
    {"drop": "after"},
    {"status": 500, "body": "Internal Server Error"},
    {"status": 503, "carry_out": True, "body": "no healthy upstream"},
    {"status": 200, "carry_out": True, "body": ""},
    {"status": 200, "carry_out": True, "body": {"unexpected": [1, 2, 3]}},
    {"status": 429, "headers": {"retry-after": "1"}},
]


def service(*commands: str, **more: Any) -> dict[str, Any]:
    return {"type": "service", "port": 80, "auth": False, "commands": list(commands), **more}


def twin_of(server: LocalServer) -> dstack.AsyncClient:
    return dstack.AsyncClient(server_url=server.url, project_name=server.project, user_token=server.token)


def live(run: Any) -> list[Any]:
    """Return the jobs of a run that have not ended."""
    return [job for job in run["jobs"] if job["job_submissions"][-1]["status"] not in JOB_FINISHED]


def running(api: Api, name: str, *replicas: int) -> Any:
    """Wait until exactly these replicas run; return the run."""

    def probe() -> Any:
        run = api.get(name)
        jobs = live(run)
        numbers = [job["job_spec"]["replica_num"] for job in jobs]
        up = all(job["job_submissions"][-1]["status"] == "running" for job in jobs)
        return run if up and numbers == list(replicas) else None

    return wait_until(probe)


@pytest.fixture
def client(shared_server: LocalServer) -> Any:
    with shared_server.client() as client:
        yield client
    shared_server.faults.clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("path", ["runs/get", "runs/get_plan", "runs/apply"])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_an_update_happens_once_whatever_goes_wrong(
    shared_server: LocalServer,
    client: dstack.Client,
    api: Api,
    name: str,
    fault: dict[str, Any],
    path: str,
    kind: str,
) -> None:
    client.runs.submit(service("echo first; sleep 600"), run_name=name, marker="mine")
    running(api, name, 0)
    wanted = service("echo second; sleep 600")
    shared_server.faults.add(path, **fault)

    async def go() -> tuple[str | None, int]:
        async with twin_of(shared_server) as twin:
            found = await twin.runs.apply(wanted, run_name=name)
            return found.marker, found.deployment_num

    if kind == "async":
        marker, number = asyncio.run(go())
    else:
        run = client.runs.apply(wanted, run_name=name)
        marker, number = run.marker, run.deployment_num
    assert (marker, number) == ("mine", 1)
    assert shared_server.faults.pending == 0
    run_json = running(api, name, 1)
    assert [len(job["job_submissions"]) for job in run_json["jobs"]] == [1, 1]
    assert run_json["jobs"][0]["job_submissions"][0]["termination_reason"] == "scaled_down"
    again = client.runs.apply(wanted, run_name=name)
    assert again.deployment_num == 1
    api.stop(name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("path", ["runs/get", "runs/apply"])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_an_apply_submits_once_whatever_goes_wrong(
    shared_server: LocalServer,
    client: dstack.Client,
    api: Api,
    name: str,
    fault: dict[str, Any],
    path: str,
    kind: str,
) -> None:
    shared_server.faults.add(path, **fault)

    async def go() -> str:
        async with twin_of(shared_server) as twin:
            return (await twin.runs.apply(service("sleep 600"), run_name=name)).id

    first = (
        asyncio.run(go()) if kind == "async" else client.runs.apply(service("sleep 600"), run_name=name).id
    )
    assert [run.id for run in client.runs.list(all=True) if run.name == name] == [first]
    api.stop(name)


def test_changes_that_do_not_affect_jobs_are_made_in_place(
    client: dstack.Client, api: Api, name: str
) -> None:
    client.runs.submit(service("sleep 600"), run_name=name)
    before = running(api, name, 0)
    assert client.runs.apply(service("sleep 600", priority=7), run_name=name).deployment_num == 1
    after = running(api, name, 0)
    (old,), (new,) = before["jobs"][0]["job_submissions"], after["jobs"][0]["job_submissions"]
    assert (old["id"], new["deployment_num"]) == (new["id"], 1)
    api.stop(name)


def test_replicas_come_and_go(client: dstack.Client, api: Api, name: str) -> None:
    client.runs.submit(service("sleep 600"), run_name=name)
    running(api, name, 0)
    client.runs.apply(service("sleep 600", replicas=3), run_name=name)
    running(api, name, 0, 1, 2)
    client.runs.apply(service("sleep 600", replicas=1), run_name=name)
    run = running(api, name, 0)
    assert [job["job_submissions"][-1]["termination_reason"] for job in run["jobs"]] == [
        None,
        *["scaled_down"] * 2,
    ]
    assert run["status"] == "running"
    api.stop(name)


def test_a_group_that_is_the_same_keeps_its_replicas(client: dstack.Client, api: Api, name: str) -> None:
    def groups(word: str) -> dict[str, Any]:
        return {
            "type": "service",
            "port": 80,
            "groups": [
                {"name": "a", "replicas": 1, "commands": ["echo a; sleep 600"]},
                {"name": "b", "replicas": 1, "commands": [f"echo {word}; sleep 600"]},
            ],
        }

    client.runs.submit(groups("b"), run_name=name)
    running(api, name, 0, 1)
    client.runs.apply(groups("c"), run_name=name)
    run = running(api, name, 0, 2)
    assert [job["job_spec"]["replica_group"] for job in run["jobs"]] == ["a", "b", "b"]
    api.stop(name)


def test_the_last_of_several_quick_updates_stays(client: dstack.Client, api: Api, name: str) -> None:
    client.runs.submit(service("sleep 600"), run_name=name)
    running(api, name, 0)
    for number in range(3):
        client.runs.apply(service(f"echo {number}; sleep 600"), run_name=name)
    run = wait_until(lambda: _one_of(api.get(name), "echo 2; sleep 600"))
    assert run["deployment_num"] == 3
    assert len(live(run)) == 1
    api.stop(name)
    assert api.wait(name)["status"] == "terminated"


def _one_of(run: Any, command: str) -> Any:
    jobs = live(run)
    up = len(jobs) == 1 and jobs[0]["job_submissions"][-1]["status"] == "running"
    return run if up and command in jobs[0]["job_spec"]["commands"][-1] else None


def test_a_replica_that_fails_after_an_update_ends_the_run(
    client: dstack.Client, api: Api, name: str
) -> None:
    client.runs.submit(service("sleep 600"), run_name=name)
    running(api, name, 0)
    run = client.runs.apply(service("exit 3"), run_name=name)
    outcome = run.wait(20, poll_interval=0.05)
    assert (outcome.status, outcome.exit_status) == (dstack.RunStatus.FAILED, 3)
    with pytest.raises(dstack.RunFailedError):
        run.wait_until_ready(20, poll_interval=0.05)


@pytest.mark.parametrize("abort", [False, True])
def test_a_run_that_is_being_updated_can_be_stopped(
    client: dstack.Client, api: Api, name: str, abort: bool
) -> None:
    client.runs.submit(service("trap '' INT; sleep 600"), run_name=name)
    running(api, name, 0)
    client.runs.apply(service("sleep 601"), run_name=name)
    api.stop(name, abort=abort)
    run = api.wait(name)
    assert run["status"] == "terminated"
    assert live(run) == []
