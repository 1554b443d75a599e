"""User code on what happens to a run: which calls are made, and that none of them can do harm."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from dstack_core import (
    CallbackEvent,
    Client,
    ConfigurationError,
    Progress,
    RunCallbacks,
    RunFinished,
    Task,
    check_callbacks,
    load_callbacks,
)
from dstack_core.integration import CallbackNotifier
from dstack_core.local import LocalServer
from dstack_core.models.callbacks import CALLBACK_EVENTS

WAIT = 30.0


class Log:
    """The warnings that were logged."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str, *values: Any) -> None:
        self.warnings.append(text % values)


class Journal(RunCallbacks):
    """Callbacks that keep what they were called with."""

    def __init__(self) -> None:
        self.events: list[CallbackEvent] = []
        for kind in CALLBACK_EVENTS:
            setattr(self, f"on_{kind}", self.events.append)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


class Misspelled(RunCallbacks):
    """Callbacks with a method that no event calls."""

    def on_end(self, event: CallbackEvent) -> None:
        raise AssertionError


class Failing(RunCallbacks):
    """Callbacks that raise."""

    def on_running(self, event: CallbackEvent) -> None:
        raise RuntimeError("no chat, token s3cret-token")

    def on_log_lines(self, event: CallbackEvent) -> None:
        raise SystemExit(3)


def client_of(server: LocalServer) -> Client:
    return Client(server_url=server.url, project_name=server.project, user_token=server.token)


def followed(callbacks: Sequence[Any], log: Log, *commands: str, **options: Any) -> None:
    with LocalServer() as server, client_of(server) as client:
        run = client.runs.submit(Task(commands=list(commands)), reports=True)
        notifier = CallbackNotifier(callbacks, log=log, **options)
        progress = Progress(run.name, run.id, status=str(run.last_status))
        notifier.submitted(run, client.project, progress=progress)
        for event in run.follow(progress, poll_interval=0.1):
            notifier.handle(event)
        notifier.drain()


def test_every_event_in_order_and_once() -> None:
    journal, log = Journal(), Log()
    metric = 'python3 -c "import dstack_report; dstack_report.metric(loss=0.5, step=3)"'
    followed([journal], log, "echo one", metric, "echo two; sleep 0.5", source={"task_id": "train"})
    once = [kind for kind in journal.kinds if kind not in ("log_lines", "provisioning")]
    assert once == ["submitted", "running", "metric", "ended"]
    assert not log.warnings
    lines = [line for event in journal.events for line in event.lines]
    assert lines == ["one", "two"]
    metrics = next(event for event in journal.events if event.kind == "metric")
    assert metrics.metrics == {"loss": 0.5}
    assert metrics.step == 3
    last = journal.events[-1]
    assert last.outcome is not None
    assert last.outcome.succeeded
    assert last.status == "done"
    for event in journal.events:
        assert (event.run_id, event.source) == (last.outcome.run_id, {"task_id": "train"})
        assert event.project == "main"
        assert event.url == last.outcome.url


def test_an_error_is_one_warning_for_each_kind_and_harms_no_other_callback() -> None:
    journal, log = Journal(), Log()
    followed(
        [Failing(), journal],
        log,
        "echo one; sleep 1; echo two; sleep 1; echo three",
        mask=lambda text: text.replace("s3cret-token", "***"),
    )
    first, second = sorted(log.warnings)
    assert first.startswith("Failing.on_log_lines raised SystemExit: 3. The task is not affected")
    assert second.startswith("Failing.on_running raised RuntimeError: no chat, token ***. ")
    assert journal.kinds[-1] == "ended"
    assert journal.kinds.count("log_lines") > 1


def test_log_lines_are_masked() -> None:
    journal = Journal()
    followed([journal], Log(), "echo password", mask=lambda text: text.replace("password", "***"))
    assert [line for event in journal.events for line in event.lines] == ["***"]


def test_a_slow_callback_drops_log_lines_and_no_other_call_and_is_not_waited_for() -> None:
    free, log = threading.Event(), Log()

    class Slow(Journal):
        def __init__(self) -> None:
            super().__init__()
            self.on_submitted = self.wait  # type: ignore[method-assign]

        def wait(self, event: CallbackEvent) -> None:
            free.wait(WAIT)
            self.events.append(event)

    slow = Slow()
    with LocalServer() as server, client_of(server) as client:
        run = client.runs.submit(Task(commands=["for i in 1 2 3 4 5; do echo $i; sleep 0.4; done"]))
        notifier = CallbackNotifier([slow], log=log, longest_queue=2)
        notifier.submitted(run, client.project)
        for event in run.follow(poll_interval=0.1):
            notifier.handle(event)
        # The run has ended, and its first callback has not.
        assert not slow.events
        assert not notifier.is_idle
        notifier.drain(0.1)
        free.set()
        notifier.drain()
    dropped, hanging = log.warnings
    assert "are slower than its log" in dropped
    assert "has not returned" in hanging
    assert slow.kinds[0] == "submitted"
    assert slow.kinds[-1] == "ended"
    assert sum(len(event.lines) for event in slow.events) < 5


def test_a_position_has_all_calls_before_it() -> None:
    """Two processes that follow the same run, one after the other, make each call once."""
    first, second, log = Journal(), Journal(), Log()
    with LocalServer() as server, client_of(server) as client:
        run = client.runs.submit(Task(commands=["echo one; sleep 1; echo two"]))
        notifier = CallbackNotifier([first], log=log)
        progress = Progress(run.name, run.id, status=str(run.last_status))
        notifier.submitted(run, client.project, progress=progress)
        for event in run.follow(progress, poll_interval=0.1):
            notifier.handle(event)
            progress = Progress.from_dict(event.progress.to_dict())
            if "one" in getattr(event, "lines", ()):
                break
        notifier.drain()
        notifier = CallbackNotifier([second], log=log)
        notifier.follows(run, client.project)
        for event in run.follow(progress, poll_interval=0.1):
            notifier.handle(event)
        notifier.drain()
        assert isinstance(event, RunFinished)
    assert [line for event in first.events + second.events for line in event.lines] == ["one", "two"]
    assert (first.kinds + second.kinds).count("running") == 1
    assert "submitted" not in second.kinds
    assert second.kinds[-1] == "ended"
    # The times of the statuses ride with the position, for what is traced at the end.
    assert event.progress.since["running"] == progress.since["running"] < event.progress.since["done"]


def test_a_run_that_is_taken_over_has_the_call_of_its_status() -> None:
    journal = Journal()
    with LocalServer() as server, client_of(server) as client:
        run = client.runs.submit(Task(commands=["sleep 60"]))
        while str(run.refresh().last_status) != "running":
            threading.Event().wait(0.05)
        notifier = CallbackNotifier([journal], log=Log())
        progress = Progress(run.name, run.id, status="running")
        notifier.submitted(run, client.project, progress=progress, is_taken_over=True)
        notifier.drain()
    assert journal.kinds == ["submitted", "running"]
    assert journal.events[0].is_taken_over


def test_paths_classes_and_instances_are_loaded() -> None:
    here = f"{__name__}.Journal"
    journal = Journal()
    made = load_callbacks([here, f"{__name__}:Journal", Journal, journal])
    assert [type(one) for one in made] == [Journal] * 4
    assert made[-1] is journal
    assert load_callbacks(None) == []
    assert len(load_callbacks(here)) == 1
    assert check_callbacks([Journal, here], by_path=True) == [here, here]


class NeedsArguments(RunCallbacks):
    """A class that cannot be made."""

    def __init__(self, channel: str) -> None:
        self.channel = channel


class Async:
    """A class with an async method."""

    async def on_running(self, event: CallbackEvent) -> None: ...


def local_class() -> type[RunCallbacks]:
    class Local(RunCallbacks): ...

    return Local


def class_of_a_file() -> type[RunCallbacks]:
    return type("InDag", (RunCallbacks,), {"__module__": "unusual_prefix_1_dag"})


@pytest.mark.parametrize(
    ("given", "by_path", "text"),
    [
        ("Journal", False, 'expected the path of a class such as "my_package.alerts.Alerts"'),
        (42, False, r"expected a class with methods such as on_running\(event\), got 42"),
        (Misspelled, False, r"on_ended, got on_end of Misspelled\. Did you mean 'on_ended'\?"),
        (Misspelled(), False, "got on_end of Misspelled"),
        (Async, False, "expected plain methods, got async def on_running of Async"),
        (Journal(), True, "expected a class that another process can import, got an instance of Journal"),
        (local_class(), True, "which is defined inside a function"),
        (class_of_a_file(), True, "InDag of unusual_prefix_1_dag, which is not on the import path"),
    ],
)
def test_what_cannot_be_called_is_refused(given: Any, by_path: bool, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        check_callbacks(given, by_path=by_path)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("no_such_module.Alerts", "could not import 'no_such_module.Alerts': ModuleNotFoundError"),
        (f"{__name__}.Missing", "could not import"),
        (NeedsArguments, "could not make NeedsArguments without arguments"),
    ],
)
def test_what_cannot_be_loaded_is_refused(given: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        load_callbacks(given)


def test_without_callbacks_nothing_is_done() -> None:
    notifier, log = CallbackNotifier([], log=Log()), Log()
    before = threading.active_count()
    followed([], log, "echo one")
    assert not notifier
    assert notifier.is_idle
    assert threading.active_count() <= before
