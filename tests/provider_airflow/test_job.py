"""The worker and the stopper: kills at bad moments, with a real signal and a real server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from airflow_provider_dstack._job import JobOptions, RunJob
from airflow_provider_dstack._names import RunId
from airflow_provider_dstack._stop import KILL_LIMITS, stop_run
from airflow_provider_dstack._submission import Submitter
from dstack_core import Client, Run
from dstack_core.local import LocalServer
from tests.provider_airflow.support import paths, wait_for

_LIMIT = 4.9  # seconds that Airflow's supervisor leaves between SIGTERM and SIGKILL


class Log:
    """Write like Airflow's logger does: slowly, and under a lock that is not reentrant."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._lock = threading.Lock()

    def log(self, level: int, text: str, *arguments: object) -> None:
        with self._lock:
            time.sleep(0.02)
            self.lines.append(text % arguments if arguments else text)

    def info(self, text: str, *arguments: object) -> None:
        self.log(20, text, *arguments)

    warning = error = info


def options(**change: Any) -> JobOptions:
    values: dict[str, Any] = {
        "run": RunId("job", "ours"),
        "poll_interval": 0.1,
        "retry_budget": 30.0,
        "logs": True,
        "on_kill_action": "stop",
        "hand_over_after": None,
        "was_ended": lambda: False,
        "next_try_follows": lambda error: False,
    }
    return JobOptions(**{**values, **change})


def kill_client(server: LocalServer) -> Client:
    limits: dict[str, Any] = KILL_LIMITS
    return Client(server_url=server.url, project_name=server.project, user_token=server.token, **limits)


def job_of(server: LocalServer, command: str, log: Log | None = None, **change: Any) -> RunJob:
    chosen = options(**change)

    def obtain(submitter: Submitter) -> Run:
        submitter.aim(chosen.run)
        return server.client().runs.submit(
            {"type": "task", "commands": [command]}, run_name=chosen.run.name, marker=chosen.run.marker
        )

    return RunJob(obtain, kill_client(server), chosen, log or Log())


@contextmanager
def killed_when(condition: Callable[[], object], job: RunJob) -> Iterator[list[float]]:
    """Send this process a signal whose handler kills the job, as Airflow does; tell how long that took."""
    took: list[float] = []

    def handler(number: int, frame: object) -> None:
        started = time.monotonic()
        job.kill()
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


def run_of(server: LocalServer) -> Run:
    run = server.client().runs.get("job")
    assert run is not None
    return run


def wait_until_over(server: LocalServer) -> Run:
    run = run_of(server)
    wait_for("end of the run", lambda: run.refresh().outcome(), 30)
    return run


def test_a_run_is_followed_to_its_end(server: LocalServer) -> None:
    job = job_of(server, "echo hello")
    job.follow()
    assert job.outcome is not None
    assert job.outcome.succeeded
    assert (job.killed, job.error, job.relay.tail) == (False, None, ["hello"])
    job.kill()
    assert not job.killed


def test_a_kill_stops_the_run_while_the_worker_is_logging(server: LocalServer) -> None:
    log = Log()
    job = job_of(server, "while true; do echo chatter; sleep 0.005; done", log)
    with killed_when(lambda: len(log.lines) > 20, job) as took:
        started = time.monotonic()
        job.follow()
    assert job.killed
    assert job.stopped
    assert took[0] < 3.6
    assert time.monotonic() - started < 60
    assert wait_until_over(server).raw_status == "terminated"
    assert "asked to stop" in job.interruption()


def test_a_kill_during_the_submission_stops_the_run_that_appears(server: LocalServer) -> None:
    server.faults.add("/runs/apply", delay=2.0)
    job = job_of(server, "sleep 600")
    with killed_when(lambda: paths(server, "/runs/apply"), job) as took:
        job.follow()
    assert job.killed
    assert took[0] < 3.6
    assert wait_until_over(server).raw_status == "terminated"


def test_a_kill_before_the_submission_submits_nothing(server: LocalServer) -> None:
    job = job_of(server, "sleep 600")
    job.kill()
    job.follow()
    assert job.killed
    assert paths(server, "/runs/apply") == []


def test_a_kill_ends_in_time_while_the_server_is_silent(server: LocalServer) -> None:
    job = job_of(server, "sleep 600")
    killed_at: list[float] = []

    def silenced() -> bool:
        if not job.submitted:
            return False
        server.faults.add("/api/", times=None, delay=60.0)
        time.sleep(0.3)
        killed_at.append(time.monotonic())
        return True

    with killed_when(silenced, job) as took:
        job.follow()
    assert time.monotonic() - killed_at[0] < _LIMIT
    assert took[0] < 3.7
    assert not job.stopped
    assert "may still be going" in job.interruption()


def test_a_kept_run_is_left_alone(server: LocalServer) -> None:
    job = job_of(server, "sleep 600", on_kill_action="keep")
    with killed_when(lambda: job.submitted, job):
        job.follow()
    assert "kept" in job.interruption()
    assert run_of(server).outcome() is None
    assert paths(server, "/runs/stop") == []


def test_an_exception_in_the_main_thread_stops_the_run(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.add("/runs/apply", delay=1.0)
    job = job_of(server, "sleep 600")

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            job.follow()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert wait_until_over(server).raw_status == "terminated"


def test_an_error_in_the_worker_stops_the_run(server: LocalServer) -> None:
    class Broken(Log):
        def log(self, level: int, text: str, *arguments: object) -> None:
            if text == "boom":
                raise OSError("no space left")
            super().log(level, text, *arguments)

    job = job_of(server, "echo boom; sleep 600", Broken())
    job.follow()
    assert isinstance(job.error, OSError)
    assert job.stopped
    assert wait_until_over(server).raw_status == "terminated"


def test_a_run_is_handed_over_with_what_was_read_of_it(server: LocalServer) -> None:
    job = job_of(server, "echo one; sleep 600", hand_over_after=1.5)
    job.follow()
    assert (job.outcome, job.error, job.killed) == (None, None, False)
    assert job.relay.tail == ["one"]
    assert job.progress is not None
    assert job.progress.run_id == run_of(server).id
    assert job.progress.cursors
    assert paths(server, "/runs/stop") == []
    job.kill()
    assert not job.killed


def test_a_task_that_was_ended_meanwhile_is_not_handed_over(server: LocalServer) -> None:
    job = job_of(server, "sleep 600", hand_over_after=0.5, was_ended=lambda: True)
    job.follow()
    assert job.killed
    assert wait_until_over(server).raw_status == "terminated"


def test_the_same_try_takes_the_same_run(server: LocalServer) -> None:
    first, second = job_of(server, "echo once"), job_of(server, "echo once")
    first.follow()
    second.follow()
    assert first.outcome is not None
    assert second.outcome is not None
    assert first.outcome.run_id == second.outcome.run_id
    assert second.relay.tail == ["once"]


def test_a_run_of_another_owner_is_never_stopped(server: LocalServer) -> None:
    server.client().runs.submit({"type": "task", "commands": ["sleep 600"]}, run_name="job", marker="theirs")
    job = job_of(server, "sleep 600")
    job.follow()
    assert "another owner" in str(job.error)
    assert not stop_run(kill_client(server), "job", "ours", abort=False)
    assert paths(server, "/runs/stop") == []
    assert run_of(server).outcome() is None
