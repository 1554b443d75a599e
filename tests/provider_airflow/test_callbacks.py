"""Callbacks of a task: in the worker, in the triggerer and after the deferral, each event once."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
from airflow.sdk import DAG

from airflow_provider_dstack import _trigger_relay, operators, triggers
from airflow_provider_dstack.decorators import dstack_task
from airflow_provider_dstack.errors import (
    AirflowFailException,
    DstackRunFailed,
    DstackRunInterrupted,
    DstackServerUnreachable,
)
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.triggers import DstackRunTrigger
from dstack_core import CallbackEvent, RunCallbacks
from dstack_core.integration import CallbackNotifier, callbacks
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for
from tests.provider_airflow.test_deferral import deferrable, deferred
from tests.provider_airflow.test_operator import CONTEXT, TI, operator
from tests.provider_airflow.tries import Store, Tries
from tests.provider_airflow.triggering import killed, payloads, submitted, trigger_for
from tests.provider_airflow.versions import DagSerialization

METRIC = 'python3 -c "import dstack_report; dstack_report.metric(loss=0.5)"'


class Journal(RunCallbacks):
    """Callbacks that keep what all instances of this process were called with."""

    events: ClassVar[list[CallbackEvent]] = []

    def _note(self, event: CallbackEvent) -> None:
        self.events.append(event)

    on_submitted = on_provisioning = on_running = on_log_lines = on_metric = on_ended = _note


class Failing(RunCallbacks):
    """Callbacks that raise."""

    def on_submitted(self, event: CallbackEvent) -> None:
        raise RuntimeError("the chat is down")

    def on_log_lines(self, event: CallbackEvent) -> None:
        raise RuntimeError("the chat is down")


class NeedsArguments(RunCallbacks):
    """Callbacks that cannot be made."""

    def __init__(self, channel: str) -> None: ...


JOURNAL, FAILING = f"{__name__}.Journal", f"{__name__}.Failing"


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CallbackEvent]]:
    monkeypatch.setattr(operators, "_SYNC_SECONDS", 1.0)
    Journal.events.clear()
    yield Journal.events
    Journal.events.clear()


def kinds(events: list[CallbackEvent]) -> list[str]:
    # A machine of the embedded server may be there before the first poll.
    return [event.kind for event in events if event.kind != "provisioning"]


def lines(events: list[CallbackEvent]) -> list[str]:
    return [line for event in events for line in event.lines]


def task_of(*commands: str, **arguments: Any) -> DstackRunOperator:
    return operator(
        configuration={"type": "task", "commands": list(commands)}, poll_interval=0.1, **arguments
    )


@pytest.mark.parametrize("given", [Journal, JOURNAL, [Failing, Journal], Journal()])
def test_a_waiting_task(
    server: LocalServer, events: list[CallbackEvent], capsys: pytest.CaptureFixture[str], given: Any
) -> None:
    task_of("echo one", METRIC, "echo two", callbacks=given).execute(CONTEXT)
    found = [kind for kind in kinds(events) if kind != "running"]
    assert found[0] == "submitted"
    assert found[-1] == "ended"
    assert found.count("metric") == 1
    assert lines(events) == ["one", "two"]
    assert events[-1].outcome is not None
    assert events[-1].outcome.succeeded
    expected = {"dag_id": "d", "run_id": "r", "task_id": "train", "try_number": "1", "map_index": "-1"}
    assert events[0].source == expected
    text = capsys.readouterr().out
    warnings = 2 if isinstance(given, list) else 0
    assert text.count("raised RuntimeError: the chat is down. The task is not affected") == warnings


def test_a_failed_run_has_an_end(server: LocalServer, events: list[CallbackEvent]) -> None:
    with pytest.raises(DstackRunFailed):
        task_of("exit 3", callbacks=Journal).execute(CONTEXT)
    outcome = events[-1].outcome
    assert outcome is not None
    assert outcome.exit_status == 3


def test_secrets_do_not_reach_callbacks(server: LocalServer, events: list[CallbackEvent]) -> None:
    task_of("echo $KEY", env={"KEY": "swordfish"}, callbacks=Journal).execute(CONTEXT)
    assert lines(events) == ["***"]


def test_a_decorated_task(server: LocalServer, events: list[CallbackEvent]) -> None:
    @dstack_task(image="python:3.11", poll_interval=0.1, callbacks=JOURNAL)
    def train() -> int:
        return 3

    with DAG("callbacks", schedule=None):
        result: Any = train()
    assert result.operator.execute(CONTEXT) == 3
    assert kinds(events)[0] == "submitted"
    assert kinds(events)[-1] == "ended"


def test_each_event_once_over_worker_trigger_and_resumed_task(
    server: LocalServer, events: list[CallbackEvent]
) -> None:
    commands = ["echo one; sleep 3; echo two", METRIC]
    task = deferrable(*commands, callbacks=[Journal])
    caught = deferred(task)
    before = list(events)
    assert kinds(before)[:2] == ["submitted", "running"]
    trigger = again(caught.trigger)
    assert trigger.callbacks == [JOURNAL]
    (payload,) = asyncio.run(payloads(trigger))
    # The end is for the worker.
    assert "ended" not in kinds(events)
    assert kinds(events).count("metric") == 1
    deferrable(*commands, callbacks=[Journal]).execute_complete(CONTEXT, json.loads(json.dumps(payload)))
    assert kinds(events)[-1] == "ended"
    assert lines(events) == ["one", "two"]
    for kind in ("submitted", "running", "metric", "ended"):
        assert kinds(events).count(kind) == 1
    assert events[-1].outcome is not None
    assert events[-1].outcome.metrics == {"loss": 0.5}
    since = payload["since"]
    assert since["running"] < since["done"]


def again(trigger: Any) -> DstackRunTrigger:
    """Return the trigger as a triggerer makes it from what Airflow stored."""
    path, arguments = trigger.serialize()
    assert path.endswith(".DstackRunTrigger")
    made = DstackRunTrigger(**json.loads(json.dumps(arguments)))
    made.not_before = 0.0
    made.task_instance = TI  # type: ignore[assignment]  # what is used of one
    return made


def test_the_rest_of_a_log_is_passed_on_by_the_worker(
    server: LocalServer, events: list[CallbackEvent]
) -> None:
    # More than a trigger relays at once: it fires, and leaves the rest to the worker.
    run = submitted(server, "seq 1 200000").wait(60, poll_interval=0.1)
    name = server.client().runs.list(all=True)[0]
    assert run.succeeded
    (payload,) = asyncio.run(payloads(trigger_for(name, callbacks=[JOURNAL])))
    assert payload["rest"]
    done = len(lines(events))
    assert done < 200_000
    operator(callbacks=JOURNAL).execute_complete(CONTEXT, payload)
    assert lines(events) == [str(number) for number in range(1, 200_001)]
    assert kinds(events)[-1] == "ended"


def test_a_trigger_without_the_module_warns_and_follows_the_run(
    server: LocalServer, events: list[CallbackEvent], capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted(server, "echo one")
    (payload,) = asyncio.run(payloads(trigger_for(run, callbacks=["no_such_module.Alerts"])))
    assert payload["outcome"]["status"] == "done"
    assert capsys.readouterr().out.count("could not import 'no_such_module.Alerts'") == 1


def test_a_slow_callback_does_not_block_the_triggerer(
    server: LocalServer, events: list[CallbackEvent]
) -> None:
    run = submitted(server, "echo one; sleep 1; echo two")
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.05)
            beats += 1

    async def main() -> None:
        heart = asyncio.create_task(beat())
        await payloads(trigger_for(run, callbacks=[f"{__name__}.Slow"]))
        heart.cancel()

    asyncio.run(main())
    # With each call in the loop, there would be none in its two seconds.
    assert beats > 20


class Slow(RunCallbacks):
    """Callbacks that block their thread for a second."""

    def on_log_lines(self, event: CallbackEvent) -> None:
        import time

        time.sleep(1)


def test_a_hanging_callback_delays_the_end_of_a_task_and_does_not_fail_it(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drain: Callable[..., Iterator[float]] = CallbackNotifier.pauses
    monkeypatch.setattr(CallbackNotifier, "pauses", lambda self, since=None: drain(self, 0.1))
    assert task_of("echo one", callbacks=Slow).execute(CONTEXT)["status"] == "done"
    assert "has not returned for" in capsys.readouterr().out


class Hanging(RunCallbacks):
    """Callbacks that do not return before the test ends."""

    free = threading.Event()
    called = threading.Event()

    def on_submitted(self, event: CallbackEvent) -> None:
        self.called.set()
        self.free.wait(600)


HANGING = f"{__name__}.Hanging"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hanging]]:
    """Let whatever waits for callbacks wait for as long as they hang, so that no test depends on its speed."""

    def patient(self: CallbackNotifier, **options: Any) -> Iterator[float]:
        while not self.is_idle:
            yield 0.05

    monkeypatch.setattr(CallbackNotifier, "pauses", patient)
    monkeypatch.setattr(callbacks, "DRAIN_SECONDS", 1e9)
    Hanging.free.clear()
    Hanging.called.clear()
    yield Hanging
    Hanging.free.set()


def test_a_hanging_callback_delays_neither_the_log_nor_a_kill(
    server: LocalServer, hanging: type[Hanging], capsys: pytest.CaptureFixture[str], ended_by_a_user: None
) -> None:
    task, text = task_of("sleep 1; echo later; sleep 600", callbacks=HANGING), ""

    def kill() -> None:
        nonlocal text

        def logged() -> bool:
            nonlocal text
            text += capsys.readouterr().out
            return "later" in text

        wait_for("a line of the log", logged)
        task.on_kill()

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(DstackRunInterrupted, match=r"is stopping|has ended|stopped"):
        task.execute(CONTEXT)
    killing.join()
    assert hanging.called.is_set()
    assert paths(server, "/runs/stop")


def test_a_hanging_callback_does_not_delay_the_stop_of_a_run_whose_task_fails(
    server: LocalServer, hanging: type[Hanging], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of("sleep 600", callbacks=HANGING, retry_budget=0.2)
    server.faults.add("/logs/poll", times=None, status=503)

    def free() -> None:
        wait_for("the stop", lambda: paths(server, "/runs/stop"))
        hanging.free.set()

    freeing = threading.Thread(target=free)
    freeing.start()
    with pytest.raises(DstackServerUnreachable):
        task.execute(CONTEXT)
    freeing.join()
    assert hanging.free.is_set()


def test_a_slow_callback_does_not_stop_the_log_before_the_task_is_deferred(
    server: LocalServer, hanging: type[Hanging], capsys: pytest.CaptureFixture[str]
) -> None:
    task, text = deferrable("sleep 3; echo later; sleep 600", callbacks=hanging), ""

    def free() -> None:
        def logged() -> bool:
            nonlocal text
            text += capsys.readouterr().out
            return "later" in text

        # A second after the start the task would be deferred.
        wait_for("a line of the log", logged)
        hanging.free.set()

    freeing = threading.Thread(target=free)
    freeing.start()
    deferred(task)
    freeing.join()
    assert hanging.free.is_set()


def test_a_trigger_whose_callback_hangs_relays_the_log_and_is_cancelled_at_once(
    server: LocalServer, hanging: type[Hanging], ended_by_a_user: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = submitted(server, "echo one; sleep 2; echo two; sleep 600"), ""
    trigger = trigger_for(run, callbacks=[f"{__name__}.HangingLines"])

    def logged() -> bool:
        nonlocal text
        text += capsys.readouterr().out
        return "two" in text and hanging.called.is_set()

    asyncio.run(killed(trigger, logged))
    assert paths(server, "/runs/stop")


class HangingLines(RunCallbacks):
    """Callbacks whose first line does not return before the test ends."""

    def on_log_lines(self, event: CallbackEvent) -> None:
        Hanging.called.set()
        Hanging.free.wait(600)


class Exiting(RunCallbacks):
    """Callbacks that raise what an ``except Exception`` misses."""

    def on_submitted(self, event: CallbackEvent) -> None:
        sys.exit(3)

    def on_log_lines(self, event: CallbackEvent) -> None:
        raise KeyboardInterrupt

    @property
    def on_ended(self) -> Any:
        raise GeneratorExit


def test_an_exit_of_a_callback_is_a_warning_too(
    server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert task_of("echo one", callbacks=f"{__name__}.Exiting").execute(CONTEXT)["status"] == "done"
    text = capsys.readouterr().out
    for what in ("on_submitted raised SystemExit: 3", "on_log_lines raised KeyboardInterrupt"):
        assert text.count(f"Exiting.{what}") == 1


def test_a_take_over_calls_nothing_again_that_was_saved(
    server: LocalServer, events: list[CallbackEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, Any] = {}
    monkeypatch.setattr(triggers, "save_and_rest", lambda ti, marker, state, *more: saved.update(state))
    run = submitted(server, "sleep 600")
    first = trigger_for(run, callbacks=[JOURNAL])

    async def until_killed() -> None:
        following = asyncio.create_task(payloads(first))
        # Such a run has no log, whose position would be saved.
        running = partial(wait_for, "status", lambda: saved.get("progress", {}).get("status") == "running")
        await asyncio.to_thread(running)
        following.cancel()
        await asyncio.wait([following])

    monkeypatch.setattr(_trigger_relay, "SECONDS_BETWEEN", 0.1)
    asyncio.run(until_killed())
    assert kinds(events) == ["running"]
    monkeypatch.setattr(triggers, "load", lambda ti, marker: saved)
    run.stop(until="ended")
    asyncio.run(payloads(trigger_for(run, callbacks=[JOURNAL])))
    assert kinds(events) == ["running"]


def test_a_retry_that_takes_a_run_over_calls_for_it_from_its_beginning(
    server: LocalServer, events: list[CallbackEvent]
) -> None:
    tries = Tries(server, Store())
    run = tries.lost("echo one; sleep 1; echo two")
    tries.execute("echo one; sleep 1; echo two", callbacks=Journal)
    assert [event.is_taken_over for event in events if event.kind == "submitted"] == [True]
    assert lines(events) == ["one", "two"]
    assert [event.kind for event in events].count("ended") == 1
    assert {event.run_id for event in events} == {run.id}


@pytest.mark.parametrize(("command", "calls"), [("true", ["submitted", "ended"]), ("exit 3", [])])
def test_the_end_that_no_process_saw_is_called_by_the_retry_if_that_takes_the_run(
    server: LocalServer, events: list[CallbackEvent], command: str, calls: list[str]
) -> None:
    tries = Tries(server, Store())
    run = tries.lost(command)
    run.wait(60, poll_interval=0.1)
    # After a run that failed, the retry submits another one.
    tries.execute("true", callbacks=Journal)
    assert kinds([event for event in events if event.run_id == run.id]) == calls
    assert kinds(events)[-1] == "ended"


def test_a_class_that_its_module_does_not_have_is_an_error_before_anything_is_submitted(
    server: LocalServer,
) -> None:
    absent = type("Absent", (RunCallbacks,), {"__module__": __name__})
    task = operator(callbacks=absent, deferrable=True)
    with pytest.raises(AirflowFailException, match=rf"callbacks: could not import '{__name__}.Absent'"):
        task.execute(CONTEXT)
    assert not paths(server, "/runs/apply")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"callbacks": 42}, r"callbacks: expected a class with methods such as on_running\(event\), got 42"),
        (
            {"callbacks": Journal(), "deferrable": True},
            "got an instance of Journal. A triggerer or worker makes its own; pass the class",
        ),
    ],
)
def test_what_cannot_be_called_is_an_error_of_the_dag(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        operator(**arguments)


def test_a_class_of_a_dag_file_is_refused_for_a_deferrable_task_alone() -> None:
    here = type("InDag", (RunCallbacks,), {"__module__": "unusual_prefix_1_dag"})
    assert operator(callbacks=here).callbacks == [here]
    with pytest.raises(ValueError, match="InDag of unusual_prefix_1_dag, which is not on the import path"):
        operator(callbacks=here, deferrable=True)


@pytest.mark.parametrize("given", ["no_such_module.Alerts", NeedsArguments])
def test_what_cannot_be_made_is_an_error_before_anything_is_submitted(
    server: LocalServer, given: Any
) -> None:
    with pytest.raises(AirflowFailException, match="callbacks: could not"):
        task_of("true", callbacks=given).execute(CONTEXT)
    assert not paths(server, "/runs/apply")


def test_a_dag_with_callbacks_survives_serialization() -> None:
    with DAG("serialized", schedule=None) as dag:
        operator(callbacks=Journal)
        DstackRunOperator.partial(task_id="mapped", callbacks=JOURNAL).expand(
            configuration=[{"type": "task", "commands": ["true"]}]
        )
    json.dumps(DagSerialization.to_dict(dag))
