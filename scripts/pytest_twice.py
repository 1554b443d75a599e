"""Run pytest; if only a few tests fail, run these once more, alone, and report those that pass.

The problem: the suites start hundreds of real servers, hosts and runs on two cores. A test that waits for
another process can fail for a reason that is not in the code, such as a server starved of CPU. The run takes
an hour, and one such test would hide the result of all others.

The rule: at most ``MOST`` failures are run again, without parallel workers. A test that fails again fails
the run. One that passes counts as passed in the JUnit report and is written to
``build/reports/failed-once.txt``, which ``.ci/run`` prints at its end: it has a fault, in the test or in the
code, that shows only under load and must be fixed. Only ``.ci/run`` uses this; ``make test`` stays strict.

    python -m scripts.pytest_twice [pytest's arguments]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build/reports/failed-once.txt"
# More failures mean a broken build, not a starved test.
MOST = 5
_FAILED = 1
_JUNIT = "--junitxml="


def run(arguments: Sequence[str]) -> int:
    """Run pytest with these arguments, once or twice, and return the exit status."""
    cache = tempfile.mkdtemp(prefix="pytest-twice-")
    try:
        status = _pytest([*arguments, "-o", f"cache_dir={cache}"])
        failed = _last_failed(Path(cache))
        if status != _FAILED or not 0 < len(failed) <= MOST:
            return status
        print(f"== again, alone: {', '.join(failed)}", flush=True)
        # If an option is given twice, the later one counts, so the report of all tests is not overwritten.
        alone = ["-n", "0", f"--junitxml={cache}/again.xml", "--lf", "--lfnf=none"]
        status = _pytest([*arguments, "-o", f"cache_dir={cache}", *alone])
        if status == 0:
            _count_as_passed(arguments)
            REPORT.parent.mkdir(parents=True, exist_ok=True)
            with REPORT.open("a") as report:
                report.writelines(f"{name}\n" for name in failed)
        return status
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _pytest(arguments: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode


def _count_as_passed(arguments: Sequence[str]) -> None:
    """Rewrite the JUnit report of the first run, if any: every test that failed there passed alone."""
    for path in (argument.removeprefix(_JUNIT) for argument in arguments if argument.startswith(_JUNIT)):
        report = ElementTree.parse(path)  # noqa: S314 - our own file
        for suite in report.iter("testsuite"):
            suite.attrib.update(failures="0", errors="0")
            for case in suite.iter("testcase"):
                for found in [*case.findall("failure"), *case.findall("error")]:
                    case.remove(found)
        report.write(path)


def _last_failed(cache: Path) -> list[str]:
    path = cache / "v/cache/lastfailed"
    return sorted(json.loads(path.read_text())) if path.exists() else []


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
