"""The task run and its threads: kills at bad moments, with a real signal and a real server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from airflow_provider_dstack import _stop
from airflow_provider_dstack._submission import Submitter
from airflow_provider_dstack._task_run import FINAL, TRANSITIONS, Event, State, TaskRun, TaskRunOptions
from dstack_core import Run
from dstack_core.integration import RunRef, StopState
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for

_LIMIT = 4.9  # seconds that Airflow's supervisor leaves between SIGTERM and SIGKILL
_HANDLER_LIMIT = 4.6
OURS = RunRef("job", "ours", generated=True)


class Log:
    """A logger like Airflow's: slow, and with a lock that is not reentrant."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.levels: dict[str, int] = {}
        self._lock = threading.Lock()

    def log(self, level: int, text: str, *arguments: object) -> None:
        with self._lock:
            time.sleep(0.02)
            line = text % arguments if arguments else text
            self.lines.append(line)
            self.levels[line] = level

    def info(self, text: str, *arguments: object) -> None:
        self.log(20, text, *arguments)

    def warning(self, text: str, *arguments: object) -> None:
        self.log(30, text, *arguments)

    def error(self, text: str, *arguments: object) -> None:
        self.log(40, text, *arguments)

    def about_stops(self) -> list[tuple[int, str]]:
        return [(self.levels[line], line) for line in self.lines if "stop" in line.lower()]


def options(**change: Any) -> TaskRunOptions:
    values: dict[str, Any] = {
        "ref": OURS,
        "poll_interval": 0.1,
        "retry_budget": 30.0,
        "logs": True,
        "on_kill_action": "stop",
        "hand_over_after": None,
        "was_ended": lambda: False,
        "next_try_follows": lambda error: False,
    }
    return TaskRunOptions(**{**values, **change})


def task_run_of(server: LocalServer, command: str, log: Log | None = None, **change: Any) -> TaskRun:
    chosen, client = options(**change), server.client()

    def obtain(submitter: Submitter) -> Run:
        submitter.aim(chosen.ref)
        return client.runs.submit(
            {"type": "task", "commands": [command]}, run_name=chosen.ref.name, marker=chosen.ref.marker
        )

    return TaskRun(obtain, client, chosen, log or Log())


@contextmanager
def killed_when(condition: Callable[[], object], task_run: TaskRun) -> Iterator[list[float]]:
    """Send this process a signal whose handler kills the task run, as Airflow does; yield how long that took."""
    took: list[float] = []

    def handler(number: int, frame: object) -> None:
        started = time.monotonic()
        task_run.kill()
        took.append(time.monotonic() - started)

    def send() -> None:
        wait_for("moment to kill", condition)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield took
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def interrupted_when(condition: Callable[[], object]) -> Iterator[None]:
    """Raise in the main thread, as Airflow's execution_timeout does."""

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def send() -> None:
        wait_for("moment to interrupt", condition)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def run_of(server: LocalServer) -> Run:
    run = server.client().runs.get("job")
    assert run is not None
    return run


def is_running(server: LocalServer, task_run: TaskRun) -> bool:
    return task_run.submitted and run_of(server).raw_status == "running"


def wait_until_ended(server: LocalServer) -> Run:
    server.faults.clear()
    run = run_of(server)
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)
    return run


def test_the_table_leads_from_new_to_a_final_state() -> None:
    reached = {State.NEW}
    while True:
        after = {target for (source, _), target in TRANSITIONS.items() if source in reached}
        if after <= reached:
            break
        reached |= after
    assert reached == set(State)
    leaving = {source for source, _ in TRANSITIONS}
    assert set(State) - leaving == FINAL - {State.HANDED_OVER}
    assert {event for _, event in TRANSITIONS} == set(Event)


@pytest.mark.parametrize("state", [State.NEW, State.SUBMITTING, State.FOLLOWING, State.HANDED_OVER])
@pytest.mark.parametrize("event", [Event.KILLED, Event.INTERRUPTED])
def test_a_task_can_be_ended_in_each_state_that_is_not_settled(state: State, event: Event) -> None:
    assert (state, event) in TRANSITIONS


def test_a_run_is_followed_to_its_end(server: LocalServer) -> None:
    task_run = task_run_of(server, "echo hello")
    task_run.follow()
    assert task_run.state is State.ENDED
    assert task_run.outcome is not None
    assert task_run.outcome.succeeded
    assert (task_run.is_killed, task_run.error, task_run.relay.tail) == (False, None, ["hello"])
    task_run.kill()
    assert not task_run.is_killed


def test_a_kill_stops_the_run_while_the_worker_is_logging(server: LocalServer) -> None:
    log = Log()
    task_run = task_run_of(server, "while true; do echo chatter; sleep 0.005; done", log)
    with killed_when(lambda: len(log.lines) > 20, task_run) as took:
        task_run.follow()
    assert task_run.state is State.STOPPED
    assert took[0] < _HANDLER_LIMIT
    assert wait_until_ended(server).raw_status == "terminated"
    assert len(paths(server, "/runs/stop")) == 1
    assert task_run.interruption().startswith("The task was ended before its run. Run job")


def test_a_kill_sends_the_stop_first(server: LocalServer) -> None:
    log = Log()
    task_run = task_run_of(server, "sleep 600", log)
    # Else the worker's polls come in between.
    with killed_when(lambda: is_running(server, task_run), task_run):
        task_run.follow()
    assert log.about_stops()[0] == (30, f"Stopping run job: {run_of(server).url}")
    assert log.about_stops()[-1][0] == 20


def test_a_kill_during_the_submission_stops_the_run_that_appears(server: LocalServer) -> None:
    server.faults.add("/runs/apply", delay=2.0)
    task_run = task_run_of(server, "sleep 600")
    with killed_when(lambda: paths(server, "/runs/apply"), task_run) as took:
        task_run.follow()
    assert task_run.is_killed
    assert took[0] < _HANDLER_LIMIT
    assert wait_until_ended(server).raw_status == "terminated"


def test_a_kill_before_the_submission_submits_nothing(server: LocalServer) -> None:
    task_run = task_run_of(server, "sleep 600")
    started = time.monotonic()
    task_run.kill()
    assert time.monotonic() - started < 1.0
    task_run.follow()
    assert task_run.state is State.NOTHING_LEFT
    assert "was not submitted" in task_run.interruption()
    assert paths(server, "/runs/apply") == []


@pytest.mark.parametrize("delay", [1.8, 2.5, 3.0])
def test_a_kill_reaches_a_server_whose_every_reply_is_late(server: LocalServer, delay: float) -> None:
    log = Log()
    task_run = task_run_of(server, "sleep 600", log)

    def slow() -> bool:
        if not is_running(server, task_run):
            return False
        server.faults.slow(delay)
        return True

    with killed_when(slow, task_run) as took:
        task_run.follow()
    assert took[0] < _HANDLER_LIMIT
    assert wait_until_ended(server).raw_status == "terminated"
    assert len(paths(server, "/runs/stop")) == 1


def test_a_kill_of_a_chosen_name_shares_its_time_between_check_and_stop(server: LocalServer) -> None:
    task_run = task_run_of(server, "sleep 600", ref=RunRef("job", "ours"))

    def slow() -> bool:
        if not is_running(server, task_run):
            return False
        server.faults.slow(3.0, path="/runs/get")
        return True

    with killed_when(slow, task_run) as took:
        task_run.follow()
    assert took[0] < _HANDLER_LIMIT
    assert wait_until_ended(server).raw_status == "terminated"


def test_a_kill_ends_in_time_while_the_server_does_not_answer(server: LocalServer) -> None:
    log = Log()
    task_run = task_run_of(server, "sleep 600", log)
    killed_at: list[float] = []

    def unreachable() -> bool:
        if not task_run.submitted:
            return False
        server.faults.add("/api/", times=None, delay=60.0)
        killed_at.append(time.monotonic())
        return True

    with killed_when(unreachable, task_run) as took:
        task_run.follow()
    assert time.monotonic() - killed_at[0] < _LIMIT
    assert took[0] < _HANDLER_LIMIT
    assert task_run.stopped is not None
    assert task_run.stopped.state is StopState.UNCONFIRMED
    (level, text) = log.about_stops()[-1]
    assert level == 40
    assert text.startswith("Could not confirm that run job is stopping: ")
    assert task_run.run is not None
    assert text.endswith(task_run.run.url)
    assert "Could not confirm" in task_run.interruption()


def test_a_timeout_stops_the_run_of_a_server_that_answers_in_three_seconds(server: LocalServer) -> None:
    log = Log()
    task_run = task_run_of(server, "sleep 600", log)

    def slow() -> bool:
        if not is_running(server, task_run):
            return False
        server.faults.slow(3.0)
        return True

    with interrupted_when(slow):
        task_run.follow()
    assert task_run.state is State.STOPPED
    assert task_run.stopped is not None
    assert task_run.stopped.is_safe
    assert wait_until_ended(server).raw_status == "terminated"
    assert log.about_stops()[0][1].startswith("Stopping run job: ")


def test_a_timeout_reports_a_server_that_drops_every_stop(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stop, "stop_seconds", lambda client: 7.0)
    monkeypatch.setattr("airflow_provider_dstack._task_run.stop_seconds", lambda client: 7.0)
    log = Log()
    task_run = task_run_of(server, "sleep 600", log)

    def forgetful() -> bool:
        if not is_running(server, task_run):
            return False
        server.faults.forget_stops(times=None)
        return True

    with interrupted_when(forgetful):
        task_run.follow()
    (level, text) = log.about_stops()[-1]
    assert level == 40
    assert "the server accepted the stop (2 requests), but the run is still running" in text
    assert run_of(server).url in text
    assert len(paths(server, "/runs/stop")) == 2


def test_a_killed_task_repeats_a_stop_that_the_server_dropped(server: LocalServer) -> None:
    task_run = task_run_of(server, "sleep 600")

    def forgetful() -> bool:
        if not is_running(server, task_run):
            return False
        server.faults.forget_stops()
        return True

    with killed_when(forgetful, task_run) as took:
        task_run.follow()
    assert task_run.stopped is not None
    assert task_run.stopped.is_safe
    assert took[0] < _HANDLER_LIMIT
    assert len(paths(server, "/runs/stop")) == 2
    assert wait_until_ended(server).raw_status == "terminated"


def test_a_kept_run_is_left_alone(server: LocalServer) -> None:
    log = Log()
    task_run = task_run_of(server, "sleep 600", log, on_kill_action="keep")
    with killed_when(lambda: task_run.submitted, task_run):
        task_run.follow()
    assert task_run.state is State.KEPT
    assert "keeps running: on_kill_action is 'keep'" in task_run.interruption()
    assert run_of(server).outcome() is None
    assert paths(server, "/runs/stop") == []
    assert any(run_of(server).url in line and log.levels[line] == 30 for line in log.lines)


def test_a_kill_with_a_reason_to_keep_the_run_leaves_it_alone(server: LocalServer) -> None:
    task_run = task_run_of(server, "sleep 600", why_kept=lambda: "Airflow cannot be reached")
    with killed_when(lambda: task_run.submitted, task_run):
        task_run.follow()
    assert task_run.state is State.KEPT
    assert paths(server, "/runs/stop") == []


def test_a_question_that_fails_stops_the_run(server: LocalServer) -> None:
    def fails() -> str | None:
        raise OSError("no thread")

    task_run = task_run_of(server, "sleep 600", why_kept=fails)
    with killed_when(lambda: task_run.submitted, task_run):
        task_run.follow()
    assert task_run.state is State.STOPPED


def test_an_exception_in_the_main_thread_stops_the_run(server: LocalServer) -> None:
    server.faults.add("/runs/apply", delay=1.0)
    task_run = task_run_of(server, "sleep 600")
    with interrupted_when(lambda: paths(server, "/runs/apply")):
        task_run.follow()
    assert task_run.state is State.STOPPED
    assert wait_until_ended(server).raw_status == "terminated"


def test_an_error_in_the_worker_stops_the_run(server: LocalServer) -> None:
    class Broken(Log):
        def log(self, level: int, text: str, *arguments: object) -> None:
            if text == "boom":
                raise OSError("no space left")
            super().log(level, text, *arguments)

    task_run = task_run_of(server, "echo boom; sleep 600", Broken())
    task_run.follow()
    assert isinstance(task_run.error, OSError)
    assert task_run.state is State.STOPPED
    assert wait_until_ended(server).raw_status == "terminated"


def test_an_error_with_a_next_try_leaves_the_run_to_it(server: LocalServer) -> None:
    class Broken(Log):
        def log(self, level: int, text: str, *arguments: object) -> None:
            if text == "boom":
                raise OSError("no space left")
            super().log(level, text, *arguments)

    task_run = task_run_of(server, "echo boom; sleep 600", Broken(), next_try_follows=lambda error: True)
    task_run.follow()
    assert task_run.state is State.KEPT
    assert paths(server, "/runs/stop") == []


def test_a_refused_submission_leaves_nothing_to_stop(server: LocalServer) -> None:
    body = {"detail": [{"msg": "no", "code": "error"}]}
    server.faults.add("/runs/apply", times=None, status=400, body=body)
    task_run = task_run_of(server, "sleep 600")
    task_run.follow()
    assert task_run.state is State.NOTHING_LEFT
    assert "refused" in str(task_run.error)
    assert paths(server, "/runs/stop") == []


def test_a_run_is_handed_over_with_what_was_read_of_it(server: LocalServer) -> None:
    task_run = task_run_of(server, "echo one; sleep 600", hand_over_after=1.5)
    task_run.follow()
    assert (task_run.state, task_run.outcome, task_run.error) == (State.HANDED_OVER, None, None)
    assert task_run.relay.tail == ["one"]
    assert task_run.progress is not None
    assert task_run.progress.run_id == run_of(server).id
    assert task_run.progress.cursors
    assert paths(server, "/runs/stop") == []


def test_a_kill_after_the_run_was_handed_over_stops_it(server: LocalServer) -> None:
    task_run = task_run_of(server, "sleep 600", hand_over_after=0.5)
    task_run.follow()
    task_run.kill()
    assert task_run.state is State.STOPPED
    assert wait_until_ended(server).raw_status == "terminated"


def test_a_closed_task_run_is_not_killed(server: LocalServer) -> None:
    task_run = task_run_of(server, "sleep 600", hand_over_after=0.5)
    task_run.follow()
    task_run.close()
    started = time.monotonic()
    task_run.kill()
    assert time.monotonic() - started < 1.0
    assert paths(server, "/runs/stop") == []


def test_a_task_that_was_ended_meanwhile_is_not_handed_over(server: LocalServer) -> None:
    task_run = task_run_of(server, "sleep 600", hand_over_after=0.5, was_ended=lambda: True)
    task_run.follow()
    assert task_run.state is State.STOPPED
    assert task_run.is_killed
    assert wait_until_ended(server).raw_status == "terminated"


def test_the_same_try_takes_the_same_run(server: LocalServer) -> None:
    first, second = task_run_of(server, "echo once"), task_run_of(server, "echo once")
    first.follow()
    second.follow()
    assert first.outcome is not None
    assert second.outcome is not None
    assert first.outcome.run_id == second.outcome.run_id
    assert second.relay.tail == ["once"]


def test_a_run_of_another_owner_is_never_stopped(server: LocalServer) -> None:
    server.client().runs.submit({"type": "task", "commands": ["sleep 600"]}, run_name="job", marker="theirs")
    task_run = task_run_of(server, "sleep 600", ref=RunRef("job", "ours"))
    task_run.follow()
    assert "a run of that name is active" in str(task_run.error)
    assert task_run.state is State.NOTHING_LEFT
    assert paths(server, "/runs/stop") == []
    assert run_of(server).outcome() is None
