"""The life of a run in a case: what the run prints, and how it is kept running until enough requests were sent.

A run prints 500 numbered lines. It prints the first half at once, then waits at its gate, a named pipe. The proxy
opens the gate when request number `GATE_AT` arrives, so that every life has at least two more requests, in which the
second half arrives and the end is reported. Hence a fault can hit each of the requests in `STEPS`.
"""

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
from tests.faults.faults import FAULTS, KILLS, Fault
from tests.faults.interference import Interference, Scene
from tests.faults.judges import LINES, Life, clear_error, policy, right_end
from tests.faults.loop import Loop
from tests.faults.proxy import Between, FaultProxy, Served
from tests.rig.server import RealServer

# The job prints its second half once this many requests arrived, so every life has at least two more.
GATE_AT = 14
STEPS = range(1, GATE_AT + 3)
# Retry budgets in seconds. One fault ends soon, so only a busy machine needs the long one, and slowness is not a flaw.
# The short one is for faults that never end; docs/reliability.md names it.
BUDGET = 300.0
SHORT_BUDGET = 4.0
PARTS = ONCE, NEVER_ENDING, INTERFERENCE, RESTARTS, KILLED = (
    "once",
    "never-ending",
    "interference",
    "restarts",
    "killed",
)
OVER = ("done", "failed", "terminated")

_NUMBERS = itertools.count(1)
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Result:
    """The result of a case; ``flaw`` is empty if everything held.

    ``loss`` is what the server lost on its own, according to itself. ``repeated`` lines are in a log twice, for the
    one reason that docs/reliability.md names.
    """

    part: str
    adapter: str
    fault: str
    step: int
    endpoint: str
    reached: bool
    flaw: str
    seconds: float
    loss: str = ""
    repeated: int = 0


def new_name() -> str:
    """Return a name that no other case has."""
    with _LOCK:
        return f"case-{next(_NUMBERS)}"


def commands(gate: Path, ending: str = "true") -> list[str]:
    """Return commands that print half of the lines, wait until ``gate`` is opened, and print the rest."""
    half = len(LINES) // 2
    return [
        f"printf 'line-%03d\\n' $(seq 1 {half})",
        f"read _ < {gate} || true",
        f"printf 'line-%03d\\n' $(seq {half + 1} {len(LINES)})",
        ending,
    ]


@dataclass(frozen=True)
class Stage:
    """The place of all lives: the event loop of the proxies, the server, a folder for the gates."""

    loop: Loop
    server: LocalServer
    folder: Path

    def live(
        self,
        adapter: Adapter,
        fault: Fault | None,
        step: int,
        *,
        name: str,
        budget: float,
        forever: bool = False,
        between: Between | None = None,
        ending: str = "true",
    ) -> tuple[Life, Served]:
        """Let ``adapter`` follow one run until it ends, behind a proxy with these faults."""
        began, gate = datetime.now(UTC), self.folder / name
        os.mkfifo(gate)
        task = {"type": "task", "commands": commands(gate, ending)}
        with FaultProxy(
            self.loop,
            self.server.url,
            fault,
            step,
            forever=forever,
            gate=gate,
            gate_at=GATE_AT,
            between=between,
        ) as proxy:
            case = Case(proxy.url, self.server.project, self.server.token, name, task, budget)
            started = time.monotonic()
            ended = adapter(case)
            seconds = time.monotonic() - started
            served = proxy.served
        gate.unlink()
        return Life(ended, runs_named(self.server, name, began), served.paths, seconds), served


def try_fault(
    stage: Stage, name: str, adapter: Adapter, fault: Fault | None, step: int, *, forever: bool = False
) -> Result:
    """Try one case of a fault and judge it."""
    budget = SHORT_BUDGET if forever else BUDGET
    life, served = stage.live(adapter, fault, step, name=new_name(), budget=budget, forever=forever)
    flaw = (clear_error(life) or policy(adapter, life)) if forever else right_end(life)
    abort_leftover(stage.server, life)
    return Result(
        KILLED if fault in KILLS else NEVER_ENDING if forever else ONCE,
        name,
        fault.name if fault else "none",
        step,
        _endpoint(served, step),
        fault is None or served.faults > 0,
        flaw,
        round(life.seconds, 1),
        repeated=life.ended.repeated,
    )


def try_interference(
    stage: Stage, name: str, adapter: Adapter, interference: Interference, step: int
) -> Result:
    """Try one case of an interference and judge it."""
    scene = Scene(stage.server, new_name(), step)
    lost = next(fault for fault in FAULTS if "lost reply" in fault.name)
    life, served = stage.live(
        adapter,
        lost if interference.loses_a_reply else None,
        step,
        name=scene.name,
        budget=BUDGET,
        between=interference.between(scene),
        ending=interference.ending,
    )
    flaw = interference.judge(adapter, scene, life)
    abort_leftover(stage.server, life)
    happened = scene.happened and (served.faults > 0 or not interference.loses_a_reply)
    return Result(
        INTERFERENCE,
        name,
        interference.name,
        step,
        _endpoint(served, step),
        happened,
        flaw,
        round(life.seconds, 1),
    )


def _endpoint(served: Served, step: int) -> str:
    return served.paths[step - 1] if 0 < step <= len(served.paths) else "?"


def abort_leftover(server: LocalServer, life: Life) -> None:
    """Abort the run of a case if it is still active."""
    for run in life.runs:
        if run["status"] not in OVER and not run["deleted"]:
            with server.client() as client:
                client.runs.stop(run["run_spec"]["run_name"], abort=True)


def runs_named(server: LocalServer | RealServer, name: str, since: datetime) -> list[dict[str, Any]]:
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
