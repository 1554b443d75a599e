"""Callbacks of a run in Prefect: each way to run, each event once, and no harm to a task."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import ValidationError

from dstack_core import CallbackEvent, ConfigurationError, RunCallbacks, RunFailedError, Task
from dstack_core.integration import CallbackNotifier
from dstack_core.local import LocalServer
from prefect_dstack import (
    DstackCredentials,
    DstackRun,
    arun_task,
    dstack_task,
    run_task,
    submit_run,
    wait_for_run,
)

from .journal import FULL_JOURNAL, FullJournal
from .support import all_runs, cancelled_when, events_of, outcome_of, the_run, until
from .ways import FAST, WAYS, Runner

METRIC = 'python3 -c "import dstack_report; dstack_report.metric(loss=0.5)"'
COMMANDS = ["echo one", METRIC, "echo two"]


class Failing(RunCallbacks):
    """Callbacks that log, and raise."""

    def on_submitted(self, event: CallbackEvent) -> None:
        get_run_logger().info("Submitted %s", event.run_name)
        raise RuntimeError("the chat is down")


def kinds(events: list[CallbackEvent]) -> list[str]:
    # A run of the embedded server may pass these between two polls.
    return [event.kind for event in events if event.kind not in ("provisioning", "running")]


def lines(events: list[CallbackEvent]) -> list[str]:
    return [line for event in events for line in event.lines]


def check_all(events: list[CallbackEvent]) -> None:
    found = kinds(events)
    assert found[0] == "submitted"
    assert found[-1] == "ended"
    for kind in ("submitted", "metric", "ended"):
        assert found.count(kind) == 1
    assert lines(events) == ["one", "two"]
    assert events[-1].outcome is not None
    assert events[-1].outcome.metrics == {"loss": 0.5}


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_event_once(
    dstack: LocalServer, credentials: DstackCredentials, events: list[CallbackEvent], way: Runner
) -> None:
    way(Task(commands=COMMANDS), credentials, callbacks=FullJournal, **FAST)
    check_all(events)
    assert set(events[0].source) == {"flow_run_id", "task_run_id"}
    assert not events[0].is_taken_over


@pytest.mark.usefixtures("prefect_server")
def test_an_error_is_one_warning_and_the_run_logger_works(
    dstack: LocalServer,
    credentials: DstackCredentials,
    events: list[CallbackEvent],
    caplog: pytest.LogCaptureFixture,
) -> None:
    WAYS[0](Task(commands=["true"]), credentials, callbacks=[Failing, FULL_JOURNAL], **FAST)
    assert caplog.text.count("Failing.on_submitted raised RuntimeError: the chat is down.") == 1
    assert "Submitted " in caplog.text
    assert kinds(events) == ["submitted", "ended"]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("way", WAYS[::2], ids=lambda way: way.__name__)
def test_an_event_that_the_run_is_running_comes_between_start_and_end(
    dstack: LocalServer, credentials: DstackCredentials, way: Runner
) -> None:
    way(Task(commands=["sleep 1"]), credentials, **FAST)
    (run,) = all_runs(dstack)
    events = until(lambda: (e := events_of(run.id, running=True)) and len(e) == 3 and e, what="events")
    assert [event["event"] for event in events or ()] == [
        f"dstack.run.{name}" for name in ("started", "running", "done")
    ]


@pytest.mark.usefixtures("prefect_server")
def test_a_failed_run_has_an_end(
    dstack: LocalServer, credentials: DstackCredentials, events: list[CallbackEvent]
) -> None:
    with pytest.raises(RunFailedError):
        WAYS[0](Task(commands=["exit 3"]), credentials, callbacks=FullJournal(), **FAST)
    assert events[-1].outcome is not None
    assert events[-1].outcome.exit_status == 3


@pytest.mark.usefixtures("prefect_server")
def test_submitting_and_waiting_share_the_events(
    dstack: LocalServer, credentials: DstackCredentials, events: list[CallbackEvent]
) -> None:
    seen: list[list[str]] = []

    @flow
    def both() -> None:
        run = submit_run(Task(commands=COMMANDS), credentials, callbacks=FullJournal)
        seen.append(kinds(events))
        wait_for_run(run, credentials, poll_interval=0.1, callbacks=FullJournal)

    both()
    assert seen == [["submitted"]]
    check_all(events)


@pytest.mark.usefixtures("prefect_server")
def test_a_function(dstack: LocalServer, credentials: DstackCredentials, events: list[CallbackEvent]) -> None:
    @dstack_task(credentials=credentials, image="python:3.11", poll_interval=0.1, callbacks=FullJournal)
    def train() -> int:
        print("one")  # noqa: T201 - it is the log
        return 3

    @flow
    def calls() -> int:
        return train()

    assert calls() == 3
    assert kinds(events)[0] == "submitted"
    assert kinds(events)[-1] == "ended"
    assert "one" in lines(events)


@pytest.mark.usefixtures("prefect_server")
def test_a_block(dstack: LocalServer, credentials: DstackCredentials, events: list[CallbackEvent]) -> None:
    block = DstackRun(
        credentials=credentials,
        configuration={"type": "task", "commands": COMMANDS},
        callbacks=[FULL_JOURNAL],
        poll_interval=0.1,
    )

    @flow
    def triggered() -> None:
        block.trigger().wait_for_completion()

    triggered()
    check_all(events)


def test_a_block_takes_paths_alone(credentials: DstackCredentials) -> None:
    with pytest.raises(ValidationError, match="expected the path of a class"):
        DstackRun(
            credentials=credentials, configuration={"type": "task", "commands": ["true"]}, callbacks=["X"]
        )


class Hanging(RunCallbacks):
    """Callbacks that do not return before the test ends."""

    free = threading.Event()

    def on_submitted(self, event: CallbackEvent) -> None:
        self.free.wait(600)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("run", [run_task, arun_task], ids=["sync", "async"])
def test_a_hanging_callback_delays_neither_the_log_nor_a_cancellation(
    dstack: LocalServer,
    credentials: DstackCredentials,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    run: Any,
) -> None:
    def patient(self: CallbackNotifier, **options: Any) -> Iterator[float]:
        while not self.is_idle:
            yield 0.05

    # Whatever waits for callbacks does so for as long as they hang.
    monkeypatch.setattr(CallbackNotifier, "pauses", patient)
    ids: list[UUID] = []
    task = Task(commands=["echo one; sleep 1; echo later; sleep 600"])

    @flow
    def waiting() -> None:
        ids.append(UUID(str(flow_run.id)))
        run.submit(task, credentials, callbacks=Hanging, **FAST).wait()

    Hanging.free.clear()
    try:
        with cancelled_when(lambda: "later" in caplog.text, ids):
            waiting(return_state=True)
    finally:
        Hanging.free.set()
    assert outcome_of(the_run(dstack)).reason == "stopped_by_user"


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("given", [42, "no_such_module.Alerts"])
def test_what_cannot_be_called_is_refused_before_anything_is_submitted(
    dstack: LocalServer, credentials: DstackCredentials, given: Any
) -> None:
    with pytest.raises(ConfigurationError, match="callbacks: "):
        WAYS[0](Task(commands=["true"]), credentials, callbacks=given)
    assert not [request for request in dstack.requests if request.path.endswith("/runs/apply")]


def test_a_decorated_function_refuses_it_where_it_is_decorated() -> None:
    with pytest.raises(ConfigurationError, match="callbacks: expected a class with methods"):

        @dstack_task(callbacks=42)  # type: ignore[call-overload,untyped-decorator]  # wrong on purpose
        def train() -> None: ...
