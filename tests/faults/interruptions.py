"""Take the spot machines of runs away at random moments, for each way to follow a run.

``python -m tests.faults.interruptions core|airflow|prefect``, each in its environment. Held means: the server had
one run, each attempt but the last was interrupted, the follower got the lines of all attempts once and in order,
and it reported the run as done.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from dstack_core.local import LocalServer
from tests.faults.case import Adapter, Case

_ENVIRONMENTS = {"core": "core", "airflow": "airflow_adapters", "prefect": "prefect_adapters"}
# 2 s with lines, and a moment without.
_COMMAND = "for i in $(seq 20); do echo line-$i; sleep 0.1; done; sleep 0.5"
_LATEST = 2.4
_MOST_INTERRUPTIONS = 3
_INTERRUPTED = "interrupted_by_no_capacity"
# Trials at once. They mostly wait.
_WORKERS = 6


def try_once(server: LocalServer, name: str, adapter: Adapter, moments: list[float]) -> str:
    """Interrupt a run after so many seconds of each attempt; return what did not hold, empty if all did."""
    for moment in moments:
        server.scenarios.interrupt_after(moment, run=name, noticed_after=0.0)
    task = {
        "type": "task",
        "commands": [_COMMAND],
        "spot_policy": "spot",
        "retry": {"on_events": ["interruption"], "duration": "1h"},
    }
    case = Case(
        server.url, server.project, server.token, name, task, budget=60.0, poll_interval=0.2, timeout=20
    )
    ended = adapter(case)
    seen = [run for run in server.runs if run.name == name]
    if len(seen) != 1:
        return f"{len(seen)} runs"
    (run,) = seen
    if ended.status != "done":
        return f"reported {ended.status}, {ended.error!r}"
    if run.job_reasons != (*[_INTERRUPTED] * len(moments), "done_by_runner"):
        return f"attempts ended by {run.job_reasons}"
    if list(ended.lines) != [line for line in run.log if line.startswith("line-")]:
        return f"{len(ended.lines)} lines of {len(run.log)}"
    return ""


def main() -> int:
    """Try one environment's adapters; return 1 if a trial did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.interruptions", description=__doc__)
    parser.add_argument("environment", choices=_ENVIRONMENTS)
    parser.add_argument("--trials", type=int, default=50, help="runs for each way to follow them")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    module = importlib.import_module(f"tests.faults.{_ENVIRONMENTS[chosen.environment]}")
    draw = random.Random(chosen.seed)
    flaws = 0
    with (
        getattr(module, "host", contextlib.nullcontext)(),
        LocalServer(step_seconds=0.0) as server,
        ThreadPoolExecutor(_WORKERS) as pool,
    ):
        for number, (way, adapter) in enumerate(module.ADAPTERS.items()):
            moments = [
                [draw.uniform(0.0, _LATEST) for _ in range(draw.randint(1, _MOST_INTERRUPTIONS))]
                for _ in range(chosen.trials)
            ]
            trials = [
                partial(try_once, server, f"spot-{number}-{index}", adapter, each)
                for index, each in enumerate(moments)
            ]
            found = [future.result() for future in [pool.submit(trial) for trial in trials]]
            flaws += sum(map(bool, found))
            for index, flaw in enumerate(found):
                if flaw:
                    print(f"{way}: {moments[index]}: {flaw}")
            held, lost = found.count(""), sum(map(len, moments))
            print(f"{way}: {held} of {len(found)} runs held, {lost} interruptions", flush=True)
    return 1 if flaws else 0


if __name__ == "__main__":
    sys.exit(main())
