"""Kill DAG runs or flow runs with a fleet of their own at random moments, on a server that answers late.

``python -m tests.faults.fleets airflow|prefect``, each in its environment. Airflow or Prefect then does what it does by
itself, and the reaper's command runs once. Held means: the server has no fleet and no active run of the DAG run or
flow run.
"""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dstack_core.local import LocalServer

_HOSTS = {"airflow": "airflow_fleets", "prefect": "prefect_fleets"}
# Seconds: each reply takes so long at most.
_LATEST_REPLY = 2.0
# Trials at once. They mostly wait.
_WORKERS = 10
# Seconds that the server may take to end what was stopped and deleted.
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Trial:
    """A run of a host that is killed."""

    name: str
    kind: str
    moment: float
    draw: int


class Tried(NamedTuple):
    """What the kills interrupted, what was left to the reaper, and what did not hold, each by trial."""

    where: dict[str, str]
    to_the_reaper: dict[str, str]
    flaws: dict[str, str]


def left_of(server: LocalServer, is_of: Callable[[str | None], bool]) -> str:
    """Return the fleets and active runs of a host's run, as one text; empty if there are none."""
    with server.client() as client:
        fleets = [one for one in client.fleets.list() if is_of(one.marker) and not one.has_ended]
        runs = [one for one in client.runs.list() if is_of(one.marker)]
    return ", ".join(
        [
            *(f"fleet {one.name} ({one.status})" for one in fleets),
            *(f"run {one.name} ({one.raw_status})" for one in runs if one.outcome() is None),
        ]
    )


def try_all(host: Any, server: LocalServer, trials: list[Trial]) -> Tried:
    """Carry out the trials and the reaper; return what each kill interrupted, what was left to the reaper, and what
    did not hold, each by trial.
    """
    where: dict[str, str] = {}
    flaws: dict[str, str] = {}

    def carry_out(trial: Trial) -> str:
        return str(host.kill_one(trial.name, trial.kind, trial.moment, trial.draw))

    with ThreadPoolExecutor(_WORKERS) as pool:
        futures = {trial.name: pool.submit(carry_out, trial) for trial in trials}
    for name, future in futures.items():
        if future.exception() is not None:
            flaws[name] = repr(future.exception())
        else:
            where[name] = future.result() or "nothing"
    server.faults.clear()
    owners = {trial.name: partial(_is_of, host, trial.name) for trial in trials}
    to_the_reaper = {name: left for name, is_of in owners.items() if (left := left_of(server, is_of))}
    server.faults.slow(0.0, _LATEST_REPLY)
    print(host.reap(), flush=True)
    server.faults.clear()
    deadline = time.monotonic() + _END_SECONDS
    for name, is_of in owners.items():
        while (left := left_of(server, is_of)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            flaws[name] = f"{flaws.get(name, '')} left: {left}"
    return Tried(where, to_the_reaper, flaws)


def _is_of(host: Any, name: str, marker: str | None) -> bool:
    return bool(host.is_of(marker, name))


def main() -> int:
    """Carry out the trials of one environment; return 1 if one did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fleets", description=__doc__)
    parser.add_argument("environment", choices=_HOSTS)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-logs", metavar="FOLDER", help="copy the logs of trials that did not hold")
    chosen = parser.parse_args()
    module = importlib.import_module(f"tests.faults.{_HOSTS[chosen.environment]}")
    draw = random.Random(chosen.seed)
    with LocalServer(stop_grace_seconds=1.0, needs_fleet=True, instance_seconds=0.05) as server:
        server.faults.slow(0.0, _LATEST_REPLY)
        with module.host(server) as host:
            longest = host.undisturbed("undisturbed")
            print(f"A run without a kill took {longest:.0f} s.", flush=True)
            trials = [
                Trial(
                    f"trial-{index}",
                    module.KINDS[index % len(module.KINDS)],
                    draw.uniform(0.0, longest),
                    draw.randrange(1000),
                )
                for index in range(chosen.trials)
            ]
            tried = try_all(host, server, trials)
            for trial in trials:
                if trial.name in tried.to_the_reaper:
                    print(f"{_shown(trial)}: to the reaper: {tried.to_the_reaper[trial.name]}")
                if trial.name in tried.flaws:
                    print(f"{_shown(trial)}: {tried.flaws[trial.name]}")
                if chosen.keep_logs and trial.name in tried.flaws.keys() | tried.to_the_reaper.keys():
                    Path(chosen.keep_logs).mkdir(exist_ok=True)
                    shutil.copy(host.log(trial.name), Path(chosen.keep_logs) / f"{trial.name}.out")
    interrupted = Counter(tried.where.values()).most_common()
    print("Interrupted: " + ", ".join(f"{what} {number}" for what, number in interrupted))
    for kind in module.KINDS:
        print(_counted([trial for trial in trials if trial.kind == kind], tried, kind))
    print(_counted(trials, tried, "all"))
    return 1 if tried.flaws else 0


def _shown(trial: Trial) -> str:
    return f"{trial.name}: {trial.kind}, after {trial.moment:.1f} s"


def _counted(trials: list[Trial], tried: Tried, what: str) -> str:
    held = sum(trial.name not in tried.flaws for trial in trials)
    reaped = sum(trial.name in tried.to_the_reaper for trial in trials)
    return f"{what}: {held} of {len(trials)} left nothing, {reaped} of them by the reaper"


if __name__ == "__main__":
    sys.exit(main())
