"""A scripted server, a fake clock, and one way to run a flow under either driver."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstack_core import _adrive, _drive
from dstack_core._flow.steps import Flow
from dstack_core._wire.http_messages import Reply, Request
from dstack_core.errors import TransientServerError
from dstack_core.models.events import Event

DATA = Path(__file__).parent.parent / "data" / "wire"


def recorded(name: str) -> Any:
    """Return the JSON body of a recorded reply."""
    return json.loads((DATA / f"{name}.json").read_text())["response"]["json"]


def recorded_reply(name: str) -> Reply:
    """Return a recorded reply in the form the transports return it."""
    response = json.loads((DATA / f"{name}.json").read_text())["response"]
    return reply(response["json"], response["status"])


def reply(body: Any, status: int = 200, **headers: str) -> Reply:
    """Return a reply with ``body`` as JSON."""
    return Reply(status, {k.replace("_", "-"): v for k, v in headers.items()}, json.dumps(body).encode())


MISSING = recorded_reply("error_400_run_not_found_0.22.5")
LOST = TransientServerError("no answer: Connection refused")


def run_json(
    status: str = "running",
    name: str = "train",
    marker: str | None = "mine",
    run_id: str = "id-1",
    **changes: Any,
) -> dict[str, Any]:
    """Return a recorded run in another status, under another name."""
    source = "runs_get_done_e2e_0.22.5" if status == "done" else "runs_get_running_ssh_fleet_0.22.5"
    body: dict[str, Any] = copy.deepcopy(recorded(source))
    body |= {"status": status, "status_message": status, "id": run_id, **changes}
    body["run_spec"] |= {"run_name": name, "configuration_path": marker}
    for submission in [body["latest_job_submission"], body["jobs"][0]["job_submissions"][-1]]:
        submission |= {"id": "sub-0", "status": "submitted" if status == "pending" else status}
    return body


def page(*messages: tuple[int, str], next_token: str | None = None, tokens: bool = True) -> Reply:
    """Return a log page; a message is (milliseconds, text)."""
    items = [
        {
            "timestamp": f"2026-11-23T09:30:{ms // 1000:02}.{ms % 1000:03}000Z",
            "log_source": "stdout",
            "message": base64.b64encode(text.encode()).decode(),
        }
        for ms, text in messages
    ]
    body: dict[str, Any] = {"logs": items}
    return reply(body | ({"next_token": next_token, "external_url": None} if tokens else {}))


@dataclass
class Clock:
    """A fake clock; sleeping advances it."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)
        await asyncio.sleep(0)


Answer = Reply | Exception | Callable[[dict[str, Any]], "Reply | Exception"]


class Script:
    """A server that answers each path from its own list and repeats the last answer of a list forever."""

    def __init__(self, **answers: list[Answer]) -> None:
        self.answers = {name.replace("__", "/"): list(items) for name, items in answers.items()}
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def send(self, request: Request) -> Reply:
        path = "/".join(request.path.split("/")[-2:])
        body = json.loads(request.body or b"{}")
        self.requests.append((path, body))
        items = self.answers[path]
        answer = items.pop(0) if len(items) > 1 else items[0]
        if callable(answer):
            answer = answer(body)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def asend(self, request: Request) -> Reply:
        await asyncio.sleep(0)
        return self.send(request)

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for other, body in self.requests if other == path]


class Driver:
    """The sync or the async driver on a fake clock."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.clock = Clock()

    def run(self, flow: Flow[Any], script: Script) -> Any:
        if self.kind == "sync":
            return _drive.run(flow, script.send, self.clock.sleep)
        return asyncio.run(_adrive.arun(flow, script.asend, self.clock.asleep))

    def events(self, flow: Flow[Any], script: Script, keep: list[Event] | None = None) -> list[Event]:
        events: list[Event] = [] if keep is None else keep
        if self.kind == "sync":
            for event in _drive.iterate(flow, script.send, self.clock.sleep):
                events.append(event)
            return events

        async def collect() -> None:
            async for event in _adrive.aiterate(flow, script.asend, self.clock.asleep):
                events.append(event)

        asyncio.run(collect())
        return events
