"""Run ``python -m tests.faults core|airflow|prefect``, each in its environment, then ``report``.

``python -m tests.faults suites ENVIRONMENT`` runs the additional tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tests.faults import junit, latency_matrix
from tests.faults.case import Adapter
from tests.faults.latency_judge import LatencyResult
from tests.faults.life import KILLED, PARTS, RESTARTS, STEPS, Result
from tests.faults.matrix import plan, sample, try_all
from tests.faults.report import flaws, load, matrix, save, steps, write_page
from tests.faults.restarts import try_restarts

_REPORTS = Path("build/reports")
_ENVIRONMENTS = {"core": "core", "airflow": "airflow_adapters", "prefect": "prefect_adapters"}
# The environments of the tests beside the matrix.
_SUITES = [*_ENVIRONMENTS, "prefect-runners"]
# In these modules a run is followed by processes of a real host; the core has no process of its own.
_KILLED = {"airflow": "airflow_kills", "prefect": "prefect_kills"}
# These modules have ``try_ways(only)``, which ends tasks on a slow server in all ways and returns the results.
LATENCY = "latency"
_SLOW = {"airflow": "airflow_latency", "prefect": "prefect_latency"}


def main() -> int:
    """Try one environment's adapters, or write the page from saved results; return 1 if a case did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("what", choices=[*_ENVIRONMENTS, "suites", "report"])
    parser.add_argument("environment", nargs="?", choices=_SUITES, help="of the suites")
    parser.add_argument("--part", choices=["all", *PARTS, LATENCY, "sample"], default="all")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="only at these requests")
    parser.add_argument(
        "--only", default="", help='of the part latency: a regular expression in "way, fault"'
    )
    chosen = parser.parse_args()
    if chosen.what == "suites":
        return junit.run(chosen.environment, _junit(chosen.environment))
    if chosen.what == "report":
        return _report()
    if chosen.part == LATENCY:
        return _show_latencies(_try_latencies(chosen.what, chosen.only))
    began = time.monotonic()
    results = []
    for part, tried in _tried(chosen.what, chosen.part, chosen.steps):
        keep(tried, _path(chosen.what))
        results += tried
        print(f"{part}: {time.monotonic() - began:.0f} s after the start", flush=True)
    _show(results)
    found = flaws(results)
    slow = _try_latencies(chosen.what, chosen.only) if chosen.part == "all" else []
    status = _show_latencies(slow) if slow else 0
    print(*found, f"{len(results) - len(found)} of {len(results)} cases held", sep="\n")
    return 1 if found else status


def keep(results: list[Result], path: Path) -> None:
    """Add results to the saved ones, in place of those of the same cases."""
    tried = {(one.part, one.adapter, one.fault, one.step) for one in results}
    before = load([path]) if path.exists() else []
    save([one for one in before if (one.part, one.adapter, one.fault, one.step) not in tried] + results, path)


def _tried(environment: str, part: str, steps: list[int]) -> Iterator[tuple[str, list[Result]]]:
    """Yield the results of one part after the other, so that they are saved whatever happens to the next part."""
    with _host(_ENVIRONMENTS[environment]) as adapters:
        for one in PARTS if part == "all" else (part,):
            if one == RESTARTS:
                yield one, try_restarts(adapters, steps)
            elif one != KILLED:
                yield one, try_all(sample(adapters) if one == "sample" else plan(adapters, [one], steps))
    if part in ("all", KILLED) and environment in _KILLED:
        with _host(_KILLED[environment]) as adapters:
            yield KILLED, try_all(plan(adapters, [KILLED], steps))


def _try_latencies(environment: str, only: str) -> list[LatencyResult]:
    if environment not in _SLOW or importlib.util.find_spec(f"tests.faults.{_SLOW[environment]}") is None:
        return []
    module = importlib.import_module(f"tests.faults.{_SLOW[environment]}")
    results: list[LatencyResult] = module.try_ways(only)
    latency_matrix.save(results, _slow(environment))
    return results


def _show_latencies(results: list[LatencyResult]) -> int:
    found = latency_matrix.flaws(results)
    print(f"{LATENCY}:", latency_matrix.table(results), "", *found, sep="\n")
    print(f"{len(results) - len(found)} of {len(results)} cases of a slow server held")
    return 1 if found else 0


@contextlib.contextmanager
def _host(name: str) -> Iterator[Mapping[str, Adapter]]:
    """Yield the adapters of a module while its host is up."""
    module = importlib.import_module(f"tests.faults.{name}")
    with getattr(module, "host", contextlib.nullcontext)():
        yield module.ADAPTERS


def _report() -> int:
    results = load(path for name in _ENVIRONMENTS if (path := _path(name)).exists())
    slow = [
        replace(one, way=f"{name.capitalize()}: {one.way}")
        for name in _SLOW
        for one in latency_matrix.load(path for path in [_slow(name)] if path.exists())
    ]
    beside = junit.read(map(_junit, _SUITES))
    write_page(results, slow, beside)
    _show(results)
    status = _show_latencies(slow) if slow else 0
    found, missed = flaws(results), junit.flaws(beside)
    print(*found, f"{len(results) - len(found)} of {len(results)} cases held", sep="\n")
    print(*missed, f"{sum(one.held for one in beside)} of {len(beside)} additional tests held", sep="\n")
    return 1 if found or missed else status


def _show(results: list[Result]) -> None:
    again = sum(bool(one.repeated) for one in results)
    for part in PARTS:
        of = [one for one in results if one.part == part]
        if of:
            print(f"{part}:", matrix(of), "", steps(of), "", sep="\n")
    if again:
        print(
            f"in {again} of them, lines that a triggerer wrote just before it was killed are in the log twice"
        )


def _path(name: str) -> Path:
    return _REPORTS / f"faults-{name}.json"


def _slow(name: str) -> Path:
    return _REPORTS / f"faults-{LATENCY}-{name}.json"


def _junit(name: str) -> Path:
    return _REPORTS / f"faults-suites-{name}.xml"


if __name__ == "__main__":
    sys.exit(main())
