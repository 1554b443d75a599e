"""The rig itself: real runs on a real server, seen through plain requests."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.rig.server import RealServer

pytestmark = pytest.mark.real

LINES = 5000
FINISHED = {"done", "failed", "terminated"}
DEADLINE = 240.0
POLL = 0.2


class Api:
    """The few calls the smoke test needs."""

    def __init__(self, server: RealServer) -> None:
        self._server = server
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Authorization"] = f"Bearer {server.token}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self._server.url}/api/project/{self._server.project}/{path}"
        reply = self._session.post(url, json=body, timeout=30)
        assert reply.ok, reply.text
        return reply.json()

    def submit(self, *commands: str) -> str:
        name = f"rig-{uuid.uuid4().hex[:12]}"
        configuration = {"type": "task", "commands": commands, "user": "root", "fleets": [self._server.fleet]}
        spec = {"run_name": name, "configuration": configuration}
        self.post("runs/apply", {"plan": {"run_spec": spec}, "force": False})
        return name

    def wait(self, name: str, wanted: set[str], began: float, marks: dict[str, float]) -> dict[str, Any]:
        while True:
            run: dict[str, Any] = self.post("runs/get", {"run_name": name})
            marks.setdefault(run["status"], round(time.monotonic() - began, 1))
            if run["status"] in wanted:
                return run
            if run["status"] in FINISHED or time.monotonic() - began > DEADLINE:
                pytest.fail(
                    f"{name} is {run['status']}: {run['jobs'][0]['job_submissions']}\n{self._server.log_tail()}"
                )
            time.sleep(POLL)

    def log(self, run: dict[str, Any]) -> str:
        submission = run["jobs"][0]["job_submissions"][-1]["id"]
        body = {"run_name": run["run_spec"]["run_name"], "job_submission_id": submission, "limit": 1000}
        return b"".join(self._messages(body)).decode()

    def _messages(self, body: dict[str, Any]) -> Iterator[bytes]:
        page = self.post("logs/poll", body)
        while True:
            yield from (base64.b64decode(entry["message"]) for entry in page["logs"])
            if page["next_token"] is None:
                return
            page = self.post("logs/poll", {**body, "next_token": page["next_token"]})


def run_to_its_end(server: RealServer, command: str) -> tuple[dict[str, Any], str, dict[str, float]]:
    api = Api(server)
    marks: dict[str, float] = {}
    began = time.monotonic()
    run = api.wait(api.submit(command), FINISHED, began, marks)
    return run, api.log(run), marks


def test_runs_execute_at_the_same_time_and_their_logs_arrive_whole(
    real_server: RealServer, record_property: Callable[[str, object], None]
) -> None:
    commands = [
        f'for i in $(seq {LINES}); do echo "$i ✓ é 日本"; done',
        "echo before; exit 7",
        "no-such-command",
    ]
    with ThreadPoolExecutor(len(commands)) as pool:
        done, failed, missing = pool.map(lambda command: run_to_its_end(real_server, command), commands)
    record_property("boot_seconds", real_server.boot_seconds)
    record_property("fleet_idle_seconds", real_server.idle_seconds)
    record_property("seconds_to_each_status", [marks for _, _, marks in (done, failed, missing)])
    run, log, _ = done
    assert run["status"] == "done"
    assert log.splitlines() == [f"{number} ✓ é 日本" for number in range(1, LINES + 1)]
    run, log, _ = failed
    assert (run["status"], run["jobs"][0]["job_submissions"][-1]["exit_status"]) == ("failed", 7)
    assert log.splitlines()[0] == "before"
    run, _, _ = missing
    assert (run["status"], run["jobs"][0]["job_submissions"][-1]["exit_status"]) == ("failed", 127)


def test_a_run_can_be_stopped(
    real_server: RealServer, record_property: Callable[[str, object], None]
) -> None:
    api = Api(real_server)
    marks: dict[str, float] = {}
    began = time.monotonic()
    name = api.submit("trap 'echo interrupted; exit 1' INT; echo ready; sleep 600 & wait")
    run = api.wait(name, {"running"}, began, marks)
    while "ready" not in api.log(run):
        assert time.monotonic() - began < DEADLINE
        time.sleep(POLL)
    began = time.monotonic()
    api.post("runs/stop", {"runs_names": [name], "abort": False})
    run = api.wait(name, {"terminated"}, began, marks)
    record_property("seconds_to_terminated", marks["terminated"])
    assert run["termination_reason"] == "stopped_by_user"
    # Servers before 0.22 do not read the log any more once they have stopped a run.
    assert ("interrupted" in api.log(run)) == (real_server.release >= (0, 22))
