"""What importing the operators adds to the parsing of a DAG file, compared with operators of other providers."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from benchmarks.imports import fresh
from benchmarks.results import Row, Section, Table, cli

LIMIT_MILLISECONDS = 10.0
OURS = "airflow_provider_dstack"
OURS_IMPORT = f"from {OURS}.operators import DstackRunOperator"
IMPORTS = {
    OURS_IMPORT: OURS_IMPORT,
    f"all of `{OURS}`": (
        f"import {OURS}.operators, {OURS}.services, {OURS}.sensors, {OURS}.decorators, {OURS}.links"
    ),
    "BashOperator": "from airflow.providers.standard.operators.bash import BashOperator",
    "DockerOperator": "from airflow.providers.docker.operators.docker import DockerOperator",
    "DatabricksSubmitRunOperator": (
        "from airflow.providers.databricks.operators.databricks import DatabricksSubmitRunOperator"
    ),
    "KubernetesPodOperator": (
        "from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator"
    ),
}
_PROGRAM = """
import json, sys, time
from airflow.sdk import DAG
before, started = len(sys.modules), time.process_time()
{statement}
print()
print(json.dumps([(time.process_time() - started) * 1000, len(sys.modules) - before]))
"""


def measure(quick: bool) -> Section:
    """Measure every import in processes of its own; the imports take turns."""
    rounds = 3 if quick else 7
    samples: dict[str, list[list[float]]] = {name: [] for name in IMPORTS}
    for number in range(rounds + 1):
        for name, statement in IMPORTS.items():
            found = fresh(Path(sys.executable), _PROGRAM.format(statement=statement))
            if number:
                samples[name].append(found)
    cost = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in samples.items()}
    ours = cost[OURS_IMPORT][0]
    others = ", ".join(f"{name} {spent:.0f} ms" for name, (spent, _) in list(cost.items())[2:])
    pod = cost["KubernetesPodOperator"][0]
    row = Row(
        f"`{OURS_IMPORT}` in a DAG file",
        f"{ours:.1f} ms",
        others,
        f"1/{pod / ours:.0f} of the pod operator",
        "at most 10 ms on top of `from airflow.sdk import DAG`",
        ours <= LIMIT_MILLISECONDS,
    )
    table = Table(
        f"CPU time on top of `from airflow.sdk import DAG`, median of {rounds} processes, one environment for all",
        ["import", "ms", "modules loaded"],
        [[name, f"{spent:.1f}", f"{modules:.0f}"] for name, (spent, modules) in cost.items()],
    )
    return Section("DAG parsing", [row], [table])


if __name__ == "__main__":
    cli(measure)
