"""What importing the client costs, compared with the official client in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.results import Row, Section, Table, cli

OFFICIAL = Path(".venv/server-0.22.5/bin/python")
TIME_SHARE, MEMORY_SHARE = 1 / 5, 1 / 3
_PROGRAM = """
import json, re, sys, time
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, started = resident(), time.process_time()
{statement}
print(json.dumps([(time.process_time() - started) * 1000, resident() - before, len(sys.modules)]))
"""
_OURS = (
    "from dstack_core import Client, Task; Client(server_url='http://x', project_name='x', user_token='x')"
)
BARE = "import dstack_core"
FOUNDATION = "import requests, pydantic"
CASES = {
    BARE: (Path(sys.executable), "import dstack_core"),
    "import dstack_core; create a client and a task": (
        Path(sys.executable),
        f"{_OURS}; Task(commands=['true'])",
    ),
    "import dstack_core; create an async client": (
        Path(sys.executable),
        _OURS.replace("Client", "AsyncClient"),
    ),
    FOUNDATION: (Path(sys.executable), "import requests, pydantic; pydantic.BaseModel"),
    "import dstack.api": (OFFICIAL, "import dstack.api"),
}


def fresh(python: Path, program: str) -> list[float]:
    """Return the numbers that a program prints in a new process, which may use compiled modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [str(python), "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    numbers: list[float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def measure(quick: bool) -> Section:
    """Measure each import in processes of its own; the imports take turns."""
    rounds = 5 if quick else 15
    samples: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, (python, statement) in CASES.items():
            found = fresh(python, _PROGRAM.format(statement=statement))
            if number:
                samples[name].append(found)
    cost = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in samples.items()}
    section = Section("Import")
    official_time, official_memory, _ = cost["import dstack.api"]
    for name in list(CASES)[:2]:
        spent, memory, _ = cost[name]
        for what, ours, theirs, share, unit in (
            ("time", spent, official_time, TIME_SHARE, "ms"),
            ("memory", memory, official_memory, MEMORY_SHARE, "MB"),
        ):
            ratio = ours / theirs
            section.rows.append(
                Row(
                    f"`{name}`, {what}",
                    f"{ours:.1f} {unit}",
                    f"`import dstack.api`: {theirs:.1f} {unit}",
                    f"1/{theirs / ours:.1f}" if ours > 0 else "none",
                    f"at most 1/{1 / share:.0f}" if name == BARE else "none",
                    ratio <= share if name == BARE else None,
                )
            )
    section.tables.append(
        Table(
            f"CPU time and resident memory on top of a bare interpreter, median of {rounds} processes",
            ["import", "ms", "MB", "modules loaded"],
            [
                [f"`{name}`", *(f"{value:.1f}" for value in row[:2]), f"{row[2]:.0f}"]
                for name, row in cost.items()
            ],
        )
    )
    base_time, base_memory, _ = cost[FOUNDATION]
    section.notes.append(
        "`import dstack_core` loads its modules on first use, so the table also shows the cost of a client that is "
        f"ready to submit. That client is built on `requests` and `pydantic`, which alone take {base_time:.0f} ms "
        f"(1/{official_time / base_time:.1f} of the official client's time) and {base_memory:.1f} MB "
        f"(1/{official_memory / base_memory:.1f} of its memory)."
    )
    return section


if __name__ == "__main__":
    cli(measure)
