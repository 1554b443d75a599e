"""What importing the collection adds to ``from prefect import flow, task``.

Run it with the Python of a Prefect environment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from benchmarks.imports import fresh
from benchmarks.results import Row, Section, Table, cli

LIMIT_MILLISECONDS = 250.0
_OURS = "import prefect_dstack"
_PREFECT = "from prefect import flow, task"
CASES = {
    _OURS: f"{_PREFECT}; MARK; {_OURS}",
    "from prefect_dstack import DstackWorker": f"{_PREFECT}; MARK; from prefect_dstack import DstackWorker",
    _PREFECT: f"MARK; {_PREFECT}",
}
_MARK = "before, started = len(sys.modules), time.process_time()"
_PROGRAM = """
import json, sys, time
{statement}
print(json.dumps([(time.process_time() - started) * 1000, len(sys.modules) - before]))
"""


def measure(quick: bool) -> Section:
    """Measure every import in processes of its own; the imports take turns."""
    rounds = 3 if quick else 7
    samples: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, statement in CASES.items():
            program = _PROGRAM.format(statement=statement.replace("MARK", _MARK))
            found = fresh(Path(sys.executable), program)
            if number:
                samples[name].append(found)
    cost = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in samples.items()}
    ours, prefect = cost[_OURS][0], cost[_PREFECT][0]
    row = Row(
        f"`{_OURS}` in a flow's file",
        f"{ours:.1f} ms",
        f"`{_PREFECT}` itself: {prefect:.0f} ms",
        f"+{ours / prefect:.1%}",
        f"at most {LIMIT_MILLISECONDS:.0f} ms",
        ours <= LIMIT_MILLISECONDS,
    )
    table = Table(
        f"CPU time, median of {rounds} processes; ours on top of `{_PREFECT}`",
        ["import", "ms", "modules loaded"],
        [[f"`{name}`", f"{spent:.1f}", f"{modules:.0f}"] for name, (spent, modules) in cost.items()],
    )
    return Section("Prefect: import", [row], [table])


if __name__ == "__main__":
    cli(measure)
