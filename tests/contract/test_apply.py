"""A service is updated in place, on both servers: its replicas are replaced while the run stays the same."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import requests

import dstack_core as dstack
from tests.contract.conftest import Target
from tests.contract.test_contract import name
from tests.contract.test_services import SECONDS, running, serve
from tests.ports import free_port


@pytest.fixture
def _rolling(target: Target) -> None:
    if target.release < (0, 19):
        pytest.skip("older servers do not replace a running replica")


rolling = pytest.mark.usefixtures("_rolling")


def greeting(target: Target, word: str, *, run_name: str, **more: object) -> dict[str, object]:
    """Return a service that serves a word on a free port, because all jobs of the tests share one machine."""
    port = free_port()
    commands = ("mkdir -p site && cd site", f"echo {word} > greeting", serve(port))
    return target.task(*commands) | {"type": "service", "port": port, "auth": False, "name": run_name} | more


def said(target: Target, run: dstack.Run) -> str:
    url = run.wait_until_ready(target.timeout, poll_interval=target.poll_interval)
    return requests.get(f"{url}greeting", timeout=SECONDS).text.strip()


@rolling
def test_a_service_is_submitted_then_updated_then_left_unchanged(
    target: Target, client: dstack.Client
) -> None:
    wanted = name()
    first = client.runs.apply(greeting(target, "hello", run_name=wanted), marker="mine")
    try:
        assert said(target, first) == "hello"
        configuration = greeting(target, "bye", run_name=wanted)
        second = client.runs.apply(configuration)
        assert (second.id, second.marker, second.deployment_num) == (first.id, "mine", 1)
        assert said(target, second) == "bye"
        again = client.runs.apply(configuration)
        assert (again.id, again.deployment_num) == (first.id, 1)
        taken_over = client.runs.apply(configuration, marker="other")
        assert (taken_over.id, taken_over.marker, taken_over.deployment_num) == (first.id, "other", 2)
        assert said(target, taken_over) == "bye"
    finally:
        target.stop(first)
    new = client.runs.apply(greeting(target, "again", run_name=wanted))
    assert new.id != first.id
    target.stop(new)


def test_a_change_that_needs_a_new_run_is_refused_before_anything_changes(
    target: Target, client: dstack.Client
) -> None:
    wanted = name()
    configuration = greeting(target, "hello", run_name=wanted)
    with running(target, client, configuration) as run:
        changed = configuration | {"max_duration": "1h", "auth": True, "replicas": 2}
        with pytest.raises(dstack.RunNotUpdatableError, match="what would change needs a new run") as caught:
            client.runs.apply(changed)
        assert set(caught.value.changes) == {"max_duration", "auth"}
        assert (run.refresh().deployment_num, dict(run.env)) == (0, {})
        with pytest.raises(dstack.RunNameTakenError, match="expected a name that is free"):
            client.runs.submit(configuration)


def test_every_server_changes_the_number_of_replicas(target: Target, client: dstack.Client) -> None:
    wanted = name()
    configuration = greeting(target, "hello", run_name=wanted) | {"commands": ["sleep 600"]}
    with running(target, client, configuration) as run:
        updated = client.runs.apply(configuration | {"replicas": 2}, run_name=wanted)
        assert updated.id == run.id
        for _ in range(200):
            # Both replicas exist once the server has processed the run again.
            if len(updated.refresh()._snapshot.jobs) == 2:
                break
            time.sleep(target.poll_interval)
        assert [job.replica for job in updated._snapshot.jobs] == [0, 1]
        assert client.runs.apply(configuration | {"replicas": 2}, run_name=wanted).id == run.id


@rolling
def test_a_task_changes_its_priority_and_nothing_else(target: Target, client: dstack.Client) -> None:
    wanted = name()
    run = client.runs.submit(target.task("sleep 600"), run_name=wanted)
    assert client.runs.apply(target.task("sleep 600", priority=7), run_name=wanted).id == run.id
    with pytest.raises(dstack.RunNotUpdatableError) as caught:
        client.runs.apply(target.task("sleep 601", priority=7), run_name=wanted)
    assert caught.value.changes == ("commands",)
    assert run.refresh().deployment_num == 1
    target.stop(run, abort=target.kind == "local")


@rolling
def test_the_async_twin_updates_with_files(target: Target, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("first")
    wanted = name()

    def configuration() -> dict[str, object]:
        files = [{"local_path": str(tmp_path / "word"), "path": "word"}]
        port = free_port()
        commands = ("mkdir -p site && cp word site/greeting && cd site", serve(port))
        return target.task(*commands) | {"type": "service", "port": port, "auth": False, "files": files}

    async def go() -> tuple[str, str, str, str]:
        async with target.async_client() as client:
            run = await client.runs.apply(configuration(), wanted)
            try:
                before = await answer(run)
                (tmp_path / "word").write_text("second")
                again = await client.runs.apply(configuration(), wanted)
                return before, await answer(again), run.id, again.id
            finally:
                await target.stop_async(run)

    async def answer(run: dstack.AsyncRun) -> str:
        url = await run.wait_until_ready(target.timeout, poll_interval=target.poll_interval)
        return (await asyncio.to_thread(requests.get, f"{url}greeting", timeout=SECONDS)).text

    before, after, first, second = asyncio.run(go())
    assert (before, after) == ("first", "second")
    assert first == second
