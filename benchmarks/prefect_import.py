"""Measure what importing ``prefect_dstack`` adds to ``from prefect import flow, task``, in fresh processes.

Run it with the Python of an environment that holds both: ``python benchmarks/prefect_import.py [rounds]``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

LIMIT_SECONDS = 0.25
PROGRAM = """
import json, sys, time
start = time.perf_counter()
from prefect import flow, task
between = time.perf_counter()
before = len(sys.modules)
{then}
print(json.dumps([between - start, time.perf_counter() - between, len(sys.modules) - before]))
"""
CASES = {
    "import prefect_dstack": "import prefect_dstack",
    "from prefect_dstack import DstackWorker": "from prefect_dstack import DstackWorker",
    "import requests": "import requests",
    "import httpx": "import httpx",
    "import paramiko": "import paramiko",
}


def measure(then: str) -> tuple[float, float, int]:
    """Return the seconds of Prefect's import and of ``then``, and how many modules ``then`` loaded."""
    reply = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(then=then)], capture_output=True, text=True, check=True
    )
    seconds, added, modules = json.loads(reply.stdout)
    return seconds, added, modules


def main() -> None:
    """Print a line a case, medians over the rounds; ends with status 1 above the limit."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    started = time.strftime("%Y-%m-%d %H:%M")
    print(f"{started}, Python {sys.version.split()[0]}, median of {rounds} processes")
    medians = {}
    for name, then in CASES.items():
        measured = [measure(then) for _ in range(rounds)]
        prefect, added = (statistics.median(item[part] for item in measured) for part in (0, 1))
        medians[name] = added
        print(f"{name:42} +{added:.3f} s, {measured[0][2]:4} modules (Prefect itself {prefect:.2f} s)")
    sys.exit(medians["import prefect_dstack"] > LIMIT_SECONDS)


if __name__ == "__main__":
    main()
