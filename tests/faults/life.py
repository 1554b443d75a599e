"""The run of a case: what it prints, how it is held until enough was asked, and what must be true of it."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from dstack_core.local import LocalServer
from tests.faults.proxy import Fault, FaultProxy, Loop

LINES = [f"line-{number:03}" for number in range(1, 501)]
# The job prints its second half once so many requests came, so every life has at least two more.
GATE_AT = 14
STEPS = range(1, GATE_AT + 3)
TIMEOUT = 1.5
BUDGET = 30.0
SHORT_BUDGET = 4.0
POLL_INTERVAL = 0.02

_NUMBERS = itertools.count(1)
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Case:
    """Hold one case: the proxy between client and server, the run's name and its configuration."""

    proxy: FaultProxy
    server: LocalServer
    name: str
    task: dict[str, Any]
    budget: float

    @property
    def limits(self) -> dict[str, float]:
        return {"timeout": TIMEOUT, "connect_timeout": TIMEOUT, "retry_budget": self.budget}

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a client that talks to the server through the proxy."""
        return {
            "server_url": self.proxy.url,
            "project_name": self.server.project,
            "user_token": self.server.token,
            **self.limits,
        }


@dataclass(frozen=True)
class Ended:
    """Hold what an adapter saw: the lines it was given and the status it told, or the error it raised."""

    lines: Sequence[str]
    status: str | None
    error: BaseException | None = None


@dataclass(frozen=True)
class Result:
    """Hold what became of a case; ``flaw`` is empty where everything held."""

    adapter: str
    fault: str
    step: int
    endpoint: str
    for_ever: bool
    reached: bool
    flaw: str


Adapter = Callable[[Case], Ended]


def try_case(
    name: str,
    adapter: Adapter,
    loop: Loop,
    server: LocalServer,
    folder: Path,
    fault: Fault | None,
    step: int,
    *,
    for_ever: bool = False,
) -> Result:
    """Do one case and judge it."""
    with _LOCK:
        run_name = f"case-{next(_NUMBERS)}"
    began = datetime.now(UTC)
    gate = folder / run_name
    os.mkfifo(gate)
    half = len(LINES) // 2
    commands = [
        f"printf 'line-%03d\\n' $(seq 1 {half})",
        f"read _ < {gate} || true",
        f"printf 'line-%03d\\n' $(seq {half + 1} {len(LINES)})",
    ]
    budget = SHORT_BUDGET if for_ever else BUDGET
    task = {"type": "task", "commands": commands}
    with FaultProxy(loop, server.url, fault, step, for_ever=for_ever, gate=gate, gate_at=GATE_AT) as proxy:
        case = Case(proxy, server, run_name, task, budget)
        try:
            ended = adapter(case)
        except Exception as error:
            ended = Ended([], None, error)
        served = proxy.served
    gate.unlink()
    runs = runs_named(server, run_name, began)
    judge = _flaw_of_a_broken_end if for_ever else _flaw
    flaw = judge(ended, runs)
    if runs and runs[0]["status"] not in ("done", "failed", "terminated"):
        with server.client() as client:
            client.runs.stop(run_name, abort=True)
    endpoint = served.paths[step - 1] if 0 < step <= len(served.paths) else "?"
    return Result(
        name,
        fault.name if fault else "none",
        step,
        endpoint,
        for_ever,
        fault is None or served.faults > 0,
        flaw,
    )


def runs_named(server: LocalServer, name: str, since: datetime) -> list[dict[str, Any]]:
    """Return every run of that name submitted since then, replaced and deleted ones included."""
    found: list[dict[str, Any]] = []
    body: dict[str, Any] = {"limit": 100}
    headers = {"Authorization": f"Bearer {server.token}"}
    while True:
        page = httpx.post(f"{server.url}/api/runs/list", json=body, headers=headers, timeout=30).json()
        found += [run for run in page if run["run_spec"]["run_name"] == name]
        if len(page) < 100 or datetime.fromisoformat(page[-1]["submitted_at"]) < since:
            return found
        body |= {"prev_submitted_at": page[-1]["submitted_at"], "prev_run_id": page[-1]["id"]}


def _flaw(ended: Ended, runs: list[dict[str, Any]]) -> str:
    """Say what is wrong with a life in which one request went wrong."""
    if ended.error is not None:
        return f"{type(ended.error).__name__}: {ended.error}"
    if len(runs) != 1:
        return f"{len(runs)} runs on the server"
    if list(ended.lines) != LINES:
        return f"{len(ended.lines)} lines, {len(set(ended.lines))} different"
    if ended.status != "done":
        return f"ended as {ended.status}"
    return ""


def _flaw_of_a_broken_end(ended: Ended, runs: list[dict[str, Any]]) -> str:
    """Say what is wrong with a life whose server never answers rightly again."""
    if not _is_clear(ended.error):
        return f"ended as {ended.status} with {type(ended.error).__name__}: {ended.error}"
    if len(runs) > 1:
        return f"{len(runs)} runs on the server"
    if list(ended.lines) != LINES[: len(ended.lines)]:
        return "lines are missing, doubled or out of order"
    return ""


def _is_clear(error: BaseException | None) -> bool:
    """Tell whether an error is one the library or an adapter of it raises on purpose."""
    own = type(error).__module__.startswith(("dstack_core", "airflow_provider_dstack", "prefect_dstack"))
    # What no retry can mend is told to Airflow by this error of its own.
    return own or type(error).__name__ == "AirflowFailException"
