"""The run of a case: what it prints, and how it is held until enough was asked."""

from __future__ import annotations

import itertools
import os
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from dstack_core.local import LocalServer
from tests.faults.case import Adapter, Case
from tests.faults.faults import Fault
from tests.faults.judges import LINES, Life, clear_error, policy, right_end
from tests.faults.loop import Loop
from tests.faults.proxy import FaultProxy

# The job prints its second half once so many requests came, so every life has at least two more.
GATE_AT = 14
STEPS = range(1, GATE_AT + 3)
# One fault is over soon; what takes longer is a machine without a moment to spare, which is no flaw.
BUDGET = 300.0
SHORT_BUDGET = 4.0
OVER = ("done", "failed", "terminated")

_NUMBERS = itertools.count(1)
_LOCK = threading.Lock()


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
    seconds: float


def new_name() -> str:
    """Return a name that no other case has."""
    with _LOCK:
        return f"case-{next(_NUMBERS)}"


def commands(gate: Path) -> list[str]:
    """Return what prints one half of the lines, waits until ``gate`` is opened, and prints the other."""
    half = len(LINES) // 2
    return [
        f"printf 'line-%03d\\n' $(seq 1 {half})",
        f"read _ < {gate} || true",
        f"printf 'line-%03d\\n' $(seq {half + 1} {len(LINES)})",
    ]


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
    run_name = new_name()
    began = datetime.now(UTC)
    gate = folder / run_name
    os.mkfifo(gate)
    budget = SHORT_BUDGET if for_ever else BUDGET
    task = {"type": "task", "commands": commands(gate)}
    with FaultProxy(loop, server.url, fault, step, for_ever=for_ever, gate=gate, gate_at=GATE_AT) as proxy:
        case = Case(proxy.url, server.project, server.token, run_name, task, budget)
        started = time.monotonic()
        ended = adapter(case)
        seconds = time.monotonic() - started
        served = proxy.served
    gate.unlink()
    life = Life(ended, runs_named(server, run_name, began), served.paths, seconds)
    flaw = (clear_error(life) or policy(adapter, life)) if for_ever else right_end(life)
    abort_leftover(server, life)
    return Result(
        name,
        fault.name if fault else "none",
        step,
        served.paths[step - 1] if 0 < step <= len(served.paths) else "?",
        for_ever,
        fault is None or served.faults > 0,
        flaw,
        round(seconds, 1),
    )


def abort_leftover(server: LocalServer, life: Life) -> None:
    """End the run of a case that nobody ended."""
    if life.runs and life.runs[0]["status"] not in OVER:
        with server.client() as client:
            client.runs.stop(life.runs[0]["run_spec"]["run_name"], abort=True)


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
