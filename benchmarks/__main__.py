"""Run every measurement in its own environment and write ``docs/performance.md`` with its plots."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "build/bench"
PAGE = "bench-plots"
# In the order of the page, each with the environment that has what it is compared with.
MODULES = {
    "imports": "core",
    "dag_parse": "bench-airflow",
    "prefect_import": "prefect",
    "submit_requests": "core",
    "watching": "airflow",
    "idle_run": "core",
    "chatty": "airflow",
    "log_relay": "core",
    "attached_relay": "core",
    "report_delay": "core",
    "airflow_host": "airflow",
    "prefect_host": "prefect",
}
LONGEST_SECONDS = 1500.0


def python(environment: str) -> str:
    """Return the interpreter of one of the environments."""
    folder = ".venv" if environment == PAGE else os.environ.get("BENCH_ENVIRONMENTS", ".venv")
    return str(ROOT / folder / environment / "bin/python")


def run(module: str, environment: str, options: list[str]) -> bool:
    """Run one module and return whether it succeeded; whatever is left of its process group is killed."""
    print(f"== {module} ({environment})", flush=True)
    started = time.monotonic()
    command = [python(environment), "-m", f"benchmarks.{module}", *options]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        status = -1
        print(f"   {module} was ended after {LONGEST_SECONDS:.0f} s", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"   {time.monotonic() - started:.0f} s", flush=True)
    return status == 0


def main() -> None:
    """Measure everything, or the given modules; exit with status 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "modules", nargs="*", choices=[[], *MODULES], help="only these; the others' results stay"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    chosen = parser.parse_args()
    modules = chosen.modules or list(MODULES)
    failed = []
    for module in modules:
        out = REPORTS / f"{module}.json"
        out.unlink(missing_ok=True)
        quick = ["--quick"] if chosen.quick else []
        if not run(module, MODULES[module], ["--out", str(out), *quick]):
            failed.append(module)
    if not run("page", PAGE, [*(["--quick"] if chosen.quick else []), *MODULES]):
        failed.append("page")
    if failed:
        sys.exit(f"could not be measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
