"""Run ``python -m tests.faults core|airflow|prefect``, each in its environment, then ``report``.

``python -m tests.faults suites ENVIRONMENT`` runs the tests that stand beside the matrix.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from pathlib import Path

from tests.faults import junit
from tests.faults.life import STEPS
from tests.faults.matrix import BEGINNINGS, try_all
from tests.faults.report import flaws, load, matrix, save, steps, write_page

_REPORTS = Path("build/reports")
_ENVIRONMENTS = {"core": "core", "airflow": "airflow_adapters", "prefect": "prefect_adapters"}


def main() -> int:
    """Try one environment's adapters, or write the page from what was kept; 1 when a case did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("what", choices=[*_ENVIRONMENTS, "suites", "report"])
    parser.add_argument("environment", nargs="?", choices=[*_ENVIRONMENTS], help="of the suites")
    parser.add_argument("--part", choices=["all", "once", "never-ending", "sample"], default="all")
    chosen = parser.parse_args()
    if chosen.what == "suites":
        return junit.run(chosen.environment, _junit(chosen.environment))
    beside: list[junit.Case] = []
    if chosen.what == "report":
        results = load(path for name in _ENVIRONMENTS if (path := _path(name)).exists())
        beside = junit.read(map(_junit, _ENVIRONMENTS))
        write_page(results, beside)
    else:
        module = importlib.import_module(f"tests.faults.{_ENVIRONMENTS[chosen.what]}")
        with getattr(module, "host", contextlib.nullcontext)():
            results = try_all(
                module.ADAPTERS,
                steps=() if chosen.part == "never-ending" else tuple(STEPS),
                beginnings=() if chosen.part == "once" else BEGINNINGS,
                sample=chosen.part == "sample",
            )
        path = _path(chosen.what)
        tried = {(result.adapter, result.fault, result.step, result.for_ever) for result in results}
        kept = load([path]) if path.exists() else []
        save(
            [one for one in kept if (one.adapter, one.fault, one.step, one.for_ever) not in tried] + results,
            path,
        )
    once = [result for result in results if not result.for_ever]
    print(matrix(once), "", steps(once), "", "Never ending:", sep="\n")
    print(matrix([result for result in results if result.for_ever]))
    found = flaws(results)
    print(*found, f"{len(results) - len(found)} of {len(results)} cases held", sep="\n")
    if chosen.what == "report":
        missed = junit.flaws(beside)
        print(*missed, f"{sum(one.held for one in beside)} of {len(beside)} tests beside them held", sep="\n")
        found += missed
    return 1 if found else 0


def _path(name: str) -> Path:
    return _REPORTS / f"faults-{name}.json"


def _junit(name: str) -> Path:
    return _REPORTS / f"faults-suites-{name}.xml"


if __name__ == "__main__":
    sys.exit(main())
