"""Limits of time: the run's ``max_duration``, ``timeout_seconds`` of tasks and flows."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prefect import flow

from dstack_core import RunFailedError, Task
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, run_task

from . import ways
from .support import all_runs, outcome_of, stops, submissions, the_run
from .ways import FAST, WAYS, Runner, sync_direct

pytestmark = pytest.mark.usefixtures("prefect_server")

# A busy machine may need more than the first limit to submit the run; what passed earlier submitted nothing.
LIMITS = (3, 15, 75)
LONG = Task(commands=["echo started; sleep 600"])


@pytest.mark.parametrize(
    ("configured", "given", "sent"),
    [
        ({}, None, 86400),
        ({"max_duration": "2h"}, None, 7200),
        ({"max_duration": "2h"}, 600, 600),
        ({}, "off", "off"),
    ],
)
def test_a_run_has_a_longest_duration(
    configured: dict[str, Any], given: Any, sent: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    configuration = {"type": "task", "commands": ["true"], **configured}
    outcome = sync_direct(configuration, credentials, max_duration=given, **FAST)
    reply = httpx.post(
        f"{dstack.url}/api/project/{dstack.project}/runs/get",
        headers={"Authorization": f"Bearer {dstack.token}"},
        json={"run_name": outcome["run_name"]},
    )
    assert reply.json()["run_spec"]["configuration"]["max_duration"] == sent


def test_a_max_duration_ends_the_run(credentials: DstackCredentials) -> None:
    with pytest.raises(RunFailedError, match="max_duration"):
        sync_direct(Task(commands=["sleep 60"]), credentials, max_duration=1, **FAST)


# Prefect's own alarm does not work while the test's time limit holds SIGALRM.
@pytest.mark.timeout(400, method="thread")
@pytest.mark.parametrize("run", WAYS)
def test_a_task_timeout_stops_the_run(
    run: Runner, dstack: LocalServer, credentials: DstackCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in LIMITS:
        stops_before = stops(dstack)
        for name, task in (("run_task", run_task), ("arun_task", arun_task)):
            monkeypatch.setattr(ways, name, task.with_options(timeout_seconds=seconds))
        with pytest.raises(TimeoutError):
            run(LONG, credentials, **FAST)
        if all_runs(dstack):
            break
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"
    assert (submissions(dstack), stops(dstack) - stops_before) == (1, 1)


@pytest.mark.timeout(400, method="thread")
@pytest.mark.parametrize("way", ["direct", "submitted", "adirect", "asubmitted"])
def test_a_flow_timeout_stops_the_run(way: str, dstack: LocalServer, credentials: DstackCredentials) -> None:
    @flow
    def short() -> None:
        if way == "direct":
            run_task(LONG, credentials, **FAST)
        else:
            (run_task if way == "submitted" else arun_task).submit(LONG, credentials, **FAST).result()

    @flow
    async def ashort() -> None:
        await arun_task(LONG, credentials, **FAST)

    async def awaited(seconds: float) -> Any:
        return await ashort.with_options(timeout_seconds=seconds)(return_state=True)

    for seconds in LIMITS:
        stops_before = stops(dstack)
        limited = short.with_options(timeout_seconds=seconds)
        state: Any = asyncio.run(awaited(seconds)) if way == "adirect" else limited(return_state=True)
        assert state.name == "TimedOut"
        if all_runs(dstack):
            break
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"
    assert (submissions(dstack), stops(dstack) - stops_before) == (1, 1)
