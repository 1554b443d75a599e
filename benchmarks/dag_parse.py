"""Tell what importing operators adds to the parsing of a DAG file, beside those of other providers.

Run it with the Python of an Airflow environment. Providers that are not installed there are left out; to
compare, install ``apache-airflow-providers-cncf-kubernetes`` and ``-databricks`` into it first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys

RUNS = 7
OURS = "airflow_provider_dstack"
IMPORTS = {
    "airflow-provider-dstack: all of it": (
        OURS,
        f"import {OURS}.operators, {OURS}.services, {OURS}.sensors, {OURS}.decorators, {OURS}.links",
    ),
    "DstackRunOperator": (OURS, f"from {OURS}.operators import DstackRunOperator"),
    "DstackRunSensor": (OURS, f"from {OURS}.sensors import DstackRunSensor"),
    "BashOperator": (
        "airflow.providers.standard",
        "from airflow.providers.standard.operators.bash import BashOperator",
    ),
    "DatabricksSubmitRunOperator": (
        "airflow.providers.databricks",
        "from airflow.providers.databricks.operators.databricks import DatabricksSubmitRunOperator",
    ),
    "KubernetesPodOperator": (
        "airflow.providers.cncf.kubernetes",
        "from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator",
    ),
}
_PROGRAM = """
import json, sys, time
from airflow.sdk import DAG
before, started = set(sys.modules), time.process_time()
{statement}
spent = (time.process_time() - started) * 1000
print(json.dumps([spent, sorted(set(sys.modules) - before)]))
"""


def measure(statement: str) -> tuple[float, list[str]]:
    """Return the CPU time (ms) that an import adds to ``from airflow.sdk import DAG``, and its modules."""
    program = _PROGRAM.format(statement=statement)
    # As on any machine that parses a file more than once: with the compiled modules at hand.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    milliseconds, modules = json.loads(done.stdout.splitlines()[-1])
    return milliseconds, modules


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    """Print a table: the median of some runs, each in a process of its own."""
    print(f"{'import':36} {'ms':>6} {'modules':>8}    (median of {RUNS}, CPU time)")
    for name, (package, statement) in IMPORTS.items():
        if not is_installed(package):
            print(f"{name:36} {'-':>6} {'-':>8}    {package} is not installed")
            continue
        measure(statement)
        runs = [measure(statement) for _ in range(RUNS)]
        cost = statistics.median(milliseconds for milliseconds, _ in runs)
        print(f"{name:36} {cost:6.1f} {len(runs[0][1]):8}")


if __name__ == "__main__":
    main()
