"""Watch 1 to 10,000 runs in one process: requests, CPU, memory and the lag of the event loop.

Run it with the Python of an Airflow environment: the triggers are real ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.results import Curve, Row, Section, Table, cli
from benchmarks.stub_server import Stub

INTERVAL = 5.0
LAG_LIMIT = 0.1
# The load of deferred runs that one triggerer must carry with most of its core left for other triggers.
MANY = 10_000
MANY_CORES, MANY_LAG, MANY_MEMORY = 0.4, 0.05, 20 * 1024
# On a machine that is busy with something else the server's pages arrive late, and less work is done in the
# window: below this share of the polls that were due, the shares of a core cannot be compared.
ENOUGH_POLLS = 0.9
# After this many seconds without new lines, a log is read at the lowest rate, so the window begins then.
SETTLED_SECONDS = 130.0
NAMES = {"alone": "one request per run", "triggers": "`DstackRunTrigger`"}


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of watching a number of runs: requests a minute, shares of a core, bytes, seconds."""

    way: str
    runs: int
    looks: float
    log_reads: float
    cores: float
    memory: float
    lag_p50: float
    lag_p99: float
    wall_lag_p99: float
    longest_collection: float

    def line(self) -> list[str]:
        """Return a line of the table."""
        return [
            f"{self.runs:,}",
            NAMES[self.way],
            f"{self.looks:,.0f}",
            f"{self.log_reads:,.0f}",
            f"{self.cores:.1%}",
            f"{self.cores * 60_000 / self.runs:.2f}",
            f"{self.memory / self.runs / 1024:.0f}",
            f"{self.lag_p50 * 1000:.0f}",
            f"{self.lag_p99 * 1000:.0f}",
            f"{self.wall_lag_p99 * 1000:.0f}",
            f"{self.longest_collection * 1000:.0f}",
        ]


def window(
    stub: Stub, way: str, runs: int, warm: float, seconds: float, *more: str
) -> tuple[dict[str, float], Counter[str]]:
    """Watch the server's runs in a process of its own; return its costs and the requests of the window."""
    numbers = {"--runs": runs, "--interval": INTERVAL, "--warm": warm, "--seconds": seconds}
    options = [part for name, value in numbers.items() for part in (name, str(value))]
    command = [sys.executable, "-m", "benchmarks.watcher", "--way", way, "--url", stub.url]
    process = subprocess.Popen(
        [*command, "--token", stub.token, *options, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None  # noqa: S101 - asked for
        counted = {}
        before = stub.counts()
        # The triggers' log records arrive here too.
        for line in process.stdout:
            if line.startswith("begin"):
                before = stub.counts()
            elif line.startswith("{"):
                counted = json.loads(line)
                break
        asked = stub.counts() - before
    finally:
        process.kill()
        process.communicate()
    if not counted:
        raise RuntimeError(f"watching {runs} runs ({way}) ended without a result")
    return counted, asked


def watch(way: str, runs: int, warm: float, seconds: float) -> Cost:
    """Watch some silent runs, against a server in another process."""
    with Stub(runs=runs) as stub:
        counted, asked = window(stub, way, runs, warm, seconds)
    minutes = counted["seconds"] / 60
    return Cost(
        way,
        runs,
        (asked["runs/get"] + asked["runs/list"]) / minutes,
        asked["logs/poll"] / minutes,
        counted["cpu_seconds"] / counted["seconds"],
        counted["memory"],
        counted["lag_p50"],
        counted["lag_p99"],
        counted["wall_lag_p99"],
        counted["longest_collection"],
    )


def _curve(file: str, title: str, unit: str, costs: list[Cost], value: Callable[[Cost], float]) -> Curve:
    series = {
        name.strip("`"): [(float(one.runs), value(one)) for one in costs if one.way == way]
        for way, name in NAMES.items()
    }
    return Curve(file, title, "watched runs", unit, series)


def _many(cost: Cost) -> list[Row]:
    """Return the rows for the largest number of runs."""
    due = MANY / 100 * 60 / INTERVAL
    done = cost.looks / due
    full = cost.cores / min(1.0, done)
    return [
        Row(
            f"CPU of {MANY:,} deferred runs",
            f"{full:.0%} of a core"
            + ("" if done > ENOUGH_POLLS else f" (scaled: {cost.cores:.0%} measured)"),
            f"{done:.0%} of the status requests that were due, {cost.looks:,.0f} a minute",
            target=f"under {MANY_CORES:.0%}",
            reached=full < MANY_CORES,
        ),
        Row(
            f"event loop lag p99, {MANY:,} deferred runs on one core",
            f"{cost.lag_p99 * 1000:.0f} ms",
            f"longest garbage collection {cost.longest_collection * 1000:.0f} ms",
            target=f"under {MANY_LAG * 1000:.0f} ms",
            reached=cost.lag_p99 < MANY_LAG,
        ),
        Row(
            f"memory per watched run, {MANY:,} deferred",
            f"{cost.memory / MANY / 1024:.1f} KiB",
            "",
            target=f"at most {MANY_MEMORY // 1024} KiB",
            reached=cost.memory / MANY <= MANY_MEMORY,
        ),
    ]


def measure(quick: bool) -> Section:
    """Measure both ways at every size; the small sizes of the triggers at the same time."""
    small, most = ([1, 100], 1000) if quick else ([1, 100, 1000], 5000)
    warm, seconds = (30.0, 20.0) if quick else (SETTLED_SECONDS, 60.0)
    costs = [watch("alone", runs, 10.0, 20.0) for runs in (*small, most)]
    with ThreadPoolExecutor() as pool:
        costs += pool.map(lambda runs: watch("triggers", runs, warm, seconds), small)
    costs.append(watch("triggers", most, warm, seconds))
    many = watch("triggers", MANY, warm, seconds)
    ours = {cost.runs: cost for cost in costs if cost.way == "triggers"}
    theirs = {cost.runs: cost for cost in costs if cost.way == "alone"}
    section = Section("Watching many runs")
    ticks = 60 / INTERVAL
    for runs, cost in ours.items():
        wanted = -(-runs // 100) * ticks
        section.rows.append(
            Row(
                f"status requests a minute, {runs:,} deferred runs",
                f"{cost.looks:,.0f}",
                f"one request per run: {runs * ticks:,.0f} due, {theirs[runs].looks:,.0f} measured",
                f"1/{runs * ticks / max(cost.looks, 1):.0f}",
                f"one per 100 runs and tick: {wanted:,.0f}",
                # A window of a minute may contain one more tick.
                cost.looks <= wanted * (ticks + 1) / ticks + 1,
            )
        )
    cost = ours[most]
    section.rows += [
        Row(
            f"event loop lag p99, {most:,} deferred runs on one core",
            f"{cost.lag_p99 * 1000:.0f} ms",
            f"one request per run: {theirs[most].lag_p99 * 1000:.0f} ms",
            target="under 100 ms",
            reached=cost.lag_p99 < LAG_LIMIT,
        ),
        Row(
            f"CPU per watched run, {most:,} deferred",
            f"{cost.cores * 60_000 / most:.2f} ms a minute ({cost.cores:.0%} of a core in all)",
            f"one request per run: {theirs[most].cores * 60_000 / most:.2f} ms a minute, with "
            f"{theirs[most].looks / (most * ticks):.0%} of the polls that were due",
        ),
        Row(f"memory per watched run, {most:,} deferred", f"{cost.memory / most / 1024:.0f} KiB", ""),
    ]
    section.rows += _many(many)
    costs.append(many)
    head = "runs,way,status reads/min,log reads/min,core,CPU ms per run and minute,KiB per run,lag p50 ms,p99 ms,wall p99 ms,longest GC ms"
    section.tables.append(
        Table(f"Poll interval {INTERVAL:g} s, logs included", head.split(","), [one.line() for one in costs])
    )
    section.curves += [
        _curve(
            "watching-requests.png",
            "Status requests a minute",
            "requests a minute",
            costs,
            lambda one: one.looks,
        ),
        _curve("watching-cpu.png", "CPU of the process", "% of a core", costs, lambda one: one.cores * 100),
    ]
    section.notes += [
        "Every run is active and logs nothing. Each process has one core; the server, which sends canned bytes, has "
        "another. Lag is measured every 20 ms on a fixed schedule and counts the process's own CPU time. `wall` is "
        "the lag in wall-clock time, which includes the wait for a core of a busy machine.",
        "The longest pauses are full collections of Python's garbage collector, which grow with the memory of the "
        "process. `longest GC` is the longest one in the window.",
        f"The window of the triggers begins {warm:g} s after they started, when logs without new lines are read at the "
        "lowest rate. `one request per run` is our own `follow()` with a plain `AsyncClient`, measured in its first "
        "half minute. All runs share its connections, which is cheaper than one client per trigger.",
    ]
    return section


if __name__ == "__main__":
    cli(measure)
