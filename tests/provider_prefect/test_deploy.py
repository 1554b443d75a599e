"""Services that are deployed under a fixed name: submitted, updated in place, replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prefect import flow

from dstack_core import (
    CallbackEvent,
    ConfigurationError,
    RunCallbacks,
    RunError,
    RunNameTakenError,
    RunNotUpdatableError,
)
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, adeploy_service, deploy_service, submit_run
from tests.ports import free_port

from .support import all_runs, interrupt_when_asked, outcome_of, submissions, the_run

pytestmark = pytest.mark.usefixtures("prefect_server")


def saying(word: str, **keys: Any) -> dict[str, Any]:
    """Return a service that serves a word; all jobs of the embedded server share this machine's ports."""
    port = free_port()
    serve = f"mkdir -p site && cd site && echo {word} > word && exec python3 -m http.server {port}"
    return {
        "type": "service",
        "name": "said",
        "port": port,
        "auth": False,
        "commands": [f"{serve} --bind 127.0.0.1"],
        **keys,
    }


def deployed(configuration: Any, block: DstackCredentials, **options: Any) -> dict[str, Any]:
    @flow
    def deploying() -> dict[str, Any]:
        return dict(deploy_service(configuration, block, poll_interval=0.2, **options))

    return deploying()


def adeployed(configuration: Any, block: DstackCredentials, **options: Any) -> dict[str, Any]:
    @flow
    async def adeploying() -> dict[str, Any]:
        return dict(await adeploy_service(configuration, block, poll_interval=0.2, **options))

    return asyncio.run(adeploying())


Deploy = Callable[..., dict[str, Any]]
TWINS = pytest.mark.parametrize("deploy", [deployed, adeployed])


def said(service: dict[str, Any]) -> str:
    return httpx.get(f"{service['service_url']}word").text.strip()


@pytest.fixture(autouse=True)
def _end(dstack: LocalServer) -> Iterator[None]:
    yield
    with dstack.client() as client:
        for run in client.runs.list():
            client.runs.stop(run.name, abort=True, until="ended")


@TWINS
def test_a_service_is_submitted_then_updated_then_left_alone(
    deploy: Deploy, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    first = deploy(saying("hello"), credentials)
    assert (first["run_name"], said(first)) == ("said", "hello")
    configuration = saying("bye")
    second = deploy(configuration, credentials)
    assert (second["run_id"], said(second)) == (first["run_id"], "bye")
    assert deploy(configuration, credentials)["run_id"] == first["run_id"]
    run = the_run(dstack)
    assert run.deployment_num == 1
    assert run.outcome() is None


@TWINS
def test_a_service_is_replaced(deploy: Deploy, dstack: LocalServer, credentials: DstackCredentials) -> None:
    first = deploy(saying("hello"), credentials)
    second = deploy(saying("bye"), credentials, on_active="replace")
    assert said(second) == "bye"
    assert second["run_id"] != first["run_id"]
    assert [run.id for run in all_runs(dstack) if run.outcome() is None] == [second["run_id"]]


@TWINS
def test_an_active_run_of_that_name_may_fail_the_task(
    deploy: Deploy, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    first = deploy(saying("hello"), credentials, on_active="fail")
    with pytest.raises(RunNameTakenError):
        deploy(saying("bye"), credentials, on_active="fail")
    assert the_run(dstack).id == first["run_id"]
    assert said(first) == "hello"


@pytest.mark.parametrize("on_active", ["update", "replace", "fail"])
def test_a_flow_that_is_retried_finds_the_service_it_deployed(
    on_active: Any, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    configuration = saying("hello")
    runs: list[str] = []

    @flow(retries=1, retry_delay_seconds=0)
    def failing_once() -> None:
        made = deploy_service(configuration, credentials, on_active=on_active, poll_interval=0.2)
        runs.append(made["run_id"])
        if len(runs) == 1:
            raise ValueError("after the deployment")

    failing_once()
    assert runs == [the_run(dstack).id] * 2
    assert submissions(dstack) == 1


@TWINS
def test_what_cannot_be_updated_is_refused_with_advice(
    deploy: Deploy, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    configuration = saying("hello")
    deploy(configuration, credentials)
    with pytest.raises(RunNotUpdatableError, match=r'auth.* Or pass on_active="replace"') as caught:
        deploy({**configuration, "auth": True}, credentials)
    assert caught.value.changes == ("auth",)
    assert the_run(dstack).deployment_num == 0


def test_a_service_of_another_flow_run_is_taken_over(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    configuration = saying("hello")

    @flow
    def owning() -> None:
        submit_run(configuration, credentials, run_name="said")

    owning()
    assert (the_run(dstack).marker or "").startswith("prefect:flow_run/")
    deployed(configuration, credentials, max_duration="24h")
    assert (the_run(dstack).marker or "").startswith("prefect-service:")


def test_an_interrupt_stops_a_service_that_was_submitted(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    silent = {"type": "service", "name": "said", "port": 8000, "commands": ["sleep 600"]}
    thread = interrupt_when_asked(dstack, "/proxy/services/")
    with pytest.raises(KeyboardInterrupt):
        deployed(silent, credentials)
    thread.join()
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"


@pytest.mark.parametrize(
    ("configuration", "options", "told"),
    [
        (saying("x", name=None), {}, "run_name: expected the service's name"),
        ({"type": "task", "commands": ["true"]}, {"run_name": "x"}, "expected a service, got a task"),
        (saying("x"), {"on_active": "keep"}, 'on_active: expected "update", "replace" or "fail"'),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_submitted(
    configuration: Any,
    options: dict[str, Any],
    told: str,
    dstack: LocalServer,
    credentials: DstackCredentials,
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        deployed(configuration, credentials, **options)
    assert submissions(dstack) == 0


class Kept(RunCallbacks):
    """Callbacks that keep what they were called with."""

    def __init__(self) -> None:
        self.events: list[CallbackEvent] = []

    def _note(self, event: CallbackEvent) -> None:
        self.events.append(event)

    on_submitted = on_running = on_ended = _note


@TWINS
def test_callbacks_are_called_for_a_service(
    deploy: Deploy, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    kept, configuration = Kept(), saying("hello")
    first = deploy(configuration, credentials, callbacks=kept)
    deploy(configuration, credentials, callbacks=kept, wait=False)
    found = [(event.kind, event.is_taken_over) for event in kept.events]
    assert found == [("submitted", False), ("running", False), ("submitted", True)]
    assert {(event.run_name, event.run_id) for event in kept.events} == {("said", first["run_id"])}
    assert set(kept.events[0].source) == {"flow_run_id", "task_run_id"}


@TWINS
def test_the_end_of_a_service_that_never_answered_is_called(
    deploy: Deploy, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    kept = Kept()
    with pytest.raises(RunError):
        deploy({**saying("hello"), "commands": ["exit 3"]}, credentials, callbacks=kept)
    assert [event.kind for event in kept.events] == ["submitted", "ended"]
    outcome = kept.events[-1].outcome
    assert outcome is not None
    assert outcome.exit_status == 3


@TWINS
def test_callbacks_that_cannot_be_made_are_an_error_before_anything_is_submitted(
    deploy: Deploy, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match="callbacks: could not import"):
        deploy(saying("hello"), credentials, callbacks="no_such_module.Alerts")
    assert submissions(dstack) == 0
