"""Callbacks of what runs flows on machines: the worker of a pool, and the process that calls ``@dstack``."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import Pending
from pydantic import ValidationError

from dstack_core import CallbackEvent, ConfigurationError, RunCallbacks
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackWorker
from prefect_dstack import dstack as on_a_machine
from prefect_dstack._worker_variables import DstackJobConfiguration, DstackVariables

from .journal import JOURNAL
from .machines import deploy, new_pool, start
from .support import submissions, the_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


def watched(
    flow_run: FlowRun,
    pool: str,
    credentials: DstackCredentials,
    command: str,
    callbacks: list[str],
    own: list[Any] | None = None,
) -> int:
    """Run a machine by a worker in this process; return its status code."""
    configuration = DstackJobConfiguration(
        credentials=credentials,
        command=command,
        env={"PREFECT_API_URL": os.environ["PREFECT_API_URL"], "API_TOKEN": "swordfish"},
        poll_interval=0.2,
        callbacks=callbacks,
    )
    configuration.call_too(own or [])

    async def go() -> int:
        async with DstackWorker(work_pool_name=pool) as machines:
            # As Prefect hands it out; a scheduled one would be executed again.
            await machines.client.set_flow_run_state(flow_run.id, Pending(), force=True)
            status = (await machines.run(flow_run, configuration)).status_code
            await asyncio.gather(*machines._background)
            return status

    return asyncio.run(go())


@pytest.mark.parametrize("status", [0, 3])
def test_a_worker_calls_what_it_imports(
    dstack: LocalServer, credentials: DstackCredentials, events: list[CallbackEvent], status: int
) -> None:
    pool = new_pool()
    flow_run = start(deploy(pool))
    metric = """echo '::dstack::{"kind":"metric","loss":0.5}'"""
    command = f"echo one; {metric}; echo $API_TOKEN; exit {status}"
    assert watched(flow_run, pool, credentials, command, [JOURNAL]) == status
    found = [event.kind for event in events if event.kind != "log_lines"]
    assert found == ["submitted", "metric", "ended"]
    assert [line for event in events for line in event.lines] == ["one", "***"]
    assert {event.source["flow_run_id"] for event in events} == {str(flow_run.id)}
    assert {event.run_name for event in events} == {the_run(dstack).name}
    outcome = events[-1].outcome
    assert outcome is not None
    assert (outcome.exit_status or 0) == status


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no_such_module.Alerts", "could not import 'no_such_module.Alerts': ModuleNotFoundError"),
        (f"{__name__}:NeedsArguments", "could not make NeedsArguments without arguments"),
    ],
)
def test_what_a_worker_cannot_make_is_an_error_before_anything_is_submitted(
    dstack: LocalServer, credentials: DstackCredentials, path: str, text: str
) -> None:
    pool = new_pool()
    flow_run = start(deploy(pool))
    with pytest.raises(ConfigurationError, match=f"^callbacks: {text}"):
        watched(flow_run, pool, credentials, "true", [path])
    assert submissions(dstack) == 0


class NeedsArguments(RunCallbacks):
    """Callbacks that cannot be made."""

    def __init__(self, channel: str) -> None: ...


def test_a_work_pool_takes_paths_and_what_prefect_fills_in() -> None:
    for kind in (DstackVariables, DstackJobConfiguration):
        with pytest.raises(ValidationError, match="expected the path of a class"):
            kind(callbacks=["Alerts"])
    assert DstackVariables(callbacks=["{{ prefect.variables.alerts }}"]).callbacks


class Kept(RunCallbacks):
    """Callbacks that only this process has, as an instance."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def _note(self, event: CallbackEvent) -> None:
        self.kinds.append(event.kind)

    on_submitted = on_ended = _note


@pytest.mark.matrix
def test_the_process_that_calls_a_flow_calls_paths_classes_and_instances(
    dstack: LocalServer,
    credentials: DstackCredentials,
    events: list[CallbackEvent],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The machine's Python is this one.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    kept = Kept()

    @on_a_machine(credentials=credentials, poll_interval=0.2, callbacks=[JOURNAL, kept])
    @flow(log_prints=True)
    def train() -> int:
        print("by-the-flow")  # noqa: T201
        return 3

    assert train.job_variables["callbacks"] == [JOURNAL]
    assert train.with_options(retries=1).callbacks == [kept]
    assert train() == 3
    assert kept.kinds == ["submitted", "ended"]
    assert [event.kind for event in events if event.kind != "log_lines"] == ["submitted", "ended"]
    assert events[-1].outcome is not None
    assert events[-1].outcome.succeeded


@flow
def plain() -> None: ...


def test_a_worker_of_the_pool_cannot_get_an_instance(dstack: LocalServer) -> None:
    bound = on_a_machine(callbacks=Kept())(plain)
    assert "callbacks" not in bound.job_variables
    text = "callbacks: expected a class that another process can import, got an instance of Kept"
    with pytest.raises(ConfigurationError, match=text):
        bound.submit_to_work_pool()
    assert submissions(dstack) == 0


def test_what_cannot_be_called_is_refused_where_the_flow_is_decorated() -> None:
    with pytest.raises(ConfigurationError, match="callbacks: expected a class with methods"):
        on_a_machine(callbacks=42)  # type: ignore[arg-type]  # wrong on purpose
