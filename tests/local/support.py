"""Helpers of the tests of the embedded server: a plain HTTP client, waiting, and comparing with recordings."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import requests

from dstack_core.local import LocalServer

RECORDINGS = Path(__file__).parent.parent / "data" / "wire"
FINISHED = ("done", "failed", "terminated")
# Objects whose keys come from the user, not from the protocol.
FREE_KEYS = ("env", "ports", "options", "backend_data", "tags", "config")

T = TypeVar("T")


def recording(name: str) -> dict[str, Any]:
    """Return a recorded request and its reply, ``{"request": ..., "response": {"status", "json"}}``."""
    found: dict[str, Any] = json.loads((RECORDINGS / f"{name}.json").read_text())
    return found


def wait_until(probe: Callable[[], T], seconds: float = 20.0) -> T:
    """Return the first true value of `probe`; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.005)
    return value


class Api:
    """A client of a server that uses plain `requests`."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {server.token}"

    def call(self, path: str, body: Any = None) -> requests.Response:
        """POST a body to ``/api/<path>``, in which ``{p}`` is the project."""
        url = f"{self.server.url}/api/{path.replace('{p}', 'project/' + self.server.project)}"
        return self.session.post(url, json=body, timeout=30)

    def ok(self, path: str, body: Any = None) -> Any:
        """Return the JSON of a reply that must be 200."""
        reply = self.call(path, body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def apply(self, name: str | None, *commands: str, spec: Any = None, **configuration: Any) -> Any:
        """Submit a task and return the run."""
        plan = {"run_spec": task(name, *commands, spec=spec, **configuration)}
        return self.ok("{p}/runs/apply", {"plan": plan, "force": False})

    def get(self, name: str) -> Any:
        """Return the run with a name."""
        return self.ok("{p}/runs/get", {"run_name": name})

    def wait(self, name: str, *statuses: str) -> Any:
        """Wait until the run has one of the statuses (default: any final one) and return it."""
        wanted = statuses or FINISHED

        def probe() -> Any:
            run = self.get(name)
            return run if run["status"] in wanted else None

        return wait_until(probe)

    def run(self, name: str, *commands: str, **configuration: Any) -> Any:
        """Submit a task and return the finished run."""
        self.apply(name, *commands, **configuration)
        return self.wait(name)

    def stop(self, name: str, abort: bool = False) -> None:
        """Send a stop request to a run."""
        assert self.ok("{p}/runs/stop", {"runs_names": [name], "abort": abort}) is None

    def output(self, run: Any, job: int = 0, submission: int = -1) -> str:
        """Return all logs of a job submission."""
        name, chunks, token = run["run_spec"]["run_name"], [], None
        key = run["jobs"][job]["job_submissions"][submission]["id"]
        while True:
            body = {"run_name": name, "job_submission_id": key, "limit": 1000, "next_token": token}
            page = self.ok("{p}/logs/poll", body)
            chunks += [base64.b64decode(message["message"]) for message in page["logs"]]
            token = page["next_token"]
            if token is None:
                return b"".join(chunks).decode()

    def wait_output(self, name: str, text: str) -> Any:
        """Wait until a running task has printed a text; return the run."""

        wait_until(lambda: text in self.output(self.get(name)))
        return self.get(name)


def task(name: str | None, *commands: str, spec: Any = None, **configuration: Any) -> Any:
    """Return the run spec of a task."""
    found = {"configuration": {"type": "task", "commands": list(commands), **configuration}, **(spec or {})}
    return found if name is None else {"run_name": name, **found}


def ending(run: Any) -> tuple[Any, ...]:
    """Return how a run and its first job ended: statuses, reasons, exit status."""
    job = run["jobs"][0]["job_submissions"][-1]
    return (
        run["status"],
        run["termination_reason"],
        job["status"],
        job["termination_reason"],
        job["exit_status"],
    )


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__


def differences(ours: Any, recorded: Any, path: str = "$") -> list[str]:
    """Return where keys or JSON types differ; null may stand for any value."""
    if ours is None or recorded is None:
        return []
    if _kind(ours) != _kind(recorded):
        return [f"{path}: {_kind(ours)} instead of {_kind(recorded)}"]
    found: list[str] = []
    if isinstance(ours, dict) and path.rpartition(".")[2] not in FREE_KEYS:
        found += [f"{path}.{key}: missing" for key in recorded.keys() - ours.keys()]
        found += [f"{path}.{key}: unknown" for key in ours.keys() - recorded.keys()]
        for key in ours.keys() & recorded.keys():
            found += differences(ours[key], recorded[key], f"{path}.{key}")
    elif isinstance(ours, list) and recorded:
        for number, item in enumerate(ours):
            found += differences(item, recorded[min(number, len(recorded) - 1)], f"{path}[{number}]")
    return found


def alive(pid: int) -> bool:
    """Return whether a process is alive, and not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
