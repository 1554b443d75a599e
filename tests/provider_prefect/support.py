"""What the tests of this folder share: wait for conditions, read back from both servers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.sorting import LogSort
from prefect.states import Cancelling

from dstack_core import Outcome, Run
from dstack_core.local import LocalServer

T = TypeVar("T")


def until(condition: Callable[[], T], *, seconds: float = 60.0, what: str = "", pause: float = 0.05) -> T:
    """Return the first true value of ``condition``, called every ``pause``; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or condition}"
        time.sleep(pause)


def all_runs(server: LocalServer) -> list[Run]:
    """Return all runs of the embedded server, oldest first."""
    with server.client() as client:
        return client.runs.list(all=True)[::-1]


def the_run(server: LocalServer) -> Run:
    """Return the only run, active or ended."""
    (run,) = all_runs(server)
    return run


def is_running(server: LocalServer) -> bool:
    """Return whether any run is running."""
    return any(run.raw_status == "running" for run in all_runs(server))


def outcome_of(run: Run) -> Outcome:
    """Return the run's current outcome."""
    outcome = run.refresh().outcome()
    assert outcome is not None, f"{run} is active"
    return outcome


def submissions(server: LocalServer) -> int:
    """Return how many requests to submit a run were received."""
    return sum(request.path.endswith("/runs/apply") for request in server.requests)


def log_records(flow_run_id: UUID, *, last: str | Sequence[str], seconds: float = 30.0) -> list[str]:
    """Return the messages of a flow run from Prefect's API in order, once each ``last`` is in one of them.

    If a busy server does not answer in time, it is asked again.
    """

    def read() -> list[str]:
        found: list[str] = []
        with get_client(sync_client=True) as client:
            while True:
                page = client.read_logs(
                    LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])),
                    limit=200,
                    offset=len(found),
                    sort=LogSort.TIMESTAMP_ASC,
                )
                found += [log.message for log in page]
                if len(page) < 200:
                    return found

    def wanted() -> list[str]:
        try:
            found = read()
        except httpx.TimeoutException:
            return []
        text = "\n".join(found)
        return found if all(one in text for one in ([last] if isinstance(last, str) else last)) else []

    return until(wanted, seconds=seconds, what=f"{last!r} in the logs of {flow_run_id}")


def state_of(flow_run_id: UUID) -> Any:
    """Return the state of a flow run."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).state


def set_state(flow_run_id: UUID, state: State[Any]) -> None:
    """Set the state of a flow run, whatever its current state."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, state, force=True)


@contextmanager
def cancelled_when(condition: Callable[[], object], flow_run_ids: list[UUID]) -> Iterator[None]:
    """Cancel the first of the flow runs, as Prefect's UI does, once ``condition`` holds during the block."""

    def cancel() -> None:
        until(condition)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_ids[0], Cancelling())

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def interrupt_when_asked(dstack: LocalServer, path: str = "/logs/poll") -> threading.Thread:
    """Press Ctrl-C in this process at the next request for ``path``, which shows that the task waits."""

    def press() -> None:
        until(lambda: any(path in request.path for request in dstack.requests))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def stops(server: LocalServer) -> int:
    """Return how many requests to stop runs were received."""
    return sum(request.path.endswith("/runs/stop") for request in server.requests)


def artifacts_of(flow_run_id: Any) -> dict[str, Any]:
    """Return the artifacts that this package made for a flow run, by key."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    # Of the versions of a key the newest one.
    found.sort(key=lambda item: (item.created, item.id))
    return {item.key or "": item for item in found if (item.key or "").startswith("dstack-")}


def events_of(run_id: str, *, running: bool = False) -> list[Any]:
    """Return the events of a run, oldest first; that it is running only if asked: a short run passes that."""
    reply = httpx.post(
        f"{os.environ['PREFECT_API_URL']}/events/filter",
        json={"filter": {"resource": {"id": [f"dstack.run.{run_id}"]}, "order": "ASC"}},
    )
    events = list(reply.json()["events"])
    return [event for event in events if running or event["event"] != "dstack.run.running"]


def event_names(run_id: str) -> list[str]:
    """Return the names of a run's events, oldest first."""
    return [event["event"] for event in events_of(run_id)]


def task_states(flow_run_id: UUID) -> list[str]:
    """Return the types of the states of a flow run's task runs."""

    async def read() -> list[str]:
        async with get_client() as client:
            runs = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            )
            return [run.state.type.value for run in runs if run.state is not None]

    return asyncio.run(read())
