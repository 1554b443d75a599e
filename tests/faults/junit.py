"""Run the declared suites with pytest, and turn their junit reports into tables of the page."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.suites import SUITES, Row, Suite


@dataclass(frozen=True)
class Case:
    """One test from a report; ``held`` is also False if it was skipped."""

    file: str
    name: str
    held: bool
    measured: tuple[tuple[str, str], ...] = ()

    def is_of(self, test: str) -> bool:
        """Return whether a row's ``test``, a file or a node id with or without parameters, includes this one."""
        file, _, name = test.partition("::")
        return file == self.file and name in ("", self.name, self.name.partition("[")[0])


def run(environment: str, report: Path) -> int:
    """Run the tests of all suites in one environment; a report is written even if tests fail."""
    tests = list(dict.fromkeys(test for suite in SUITES for test in suite.tests(environment)))
    if not tests:
        return 0
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
    return subprocess.run(command, check=False).returncode


def read(reports: Iterable[Path]) -> list[Case]:
    """Return the tests of junit reports; a missing or incomplete report has none."""
    found = []
    for report in reports:
        try:
            root = ElementTree.parse(report).getroot()  # noqa: S314 - our own file
        except (OSError, ElementTree.ParseError):
            continue
        for case in root.iter("testcase"):
            measured = tuple(
                (one.get("name", ""), one.get("value", "")) for one in case.iterfind("properties/property")
            )
            bad = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
            found.append(Case(case.get("file", ""), case.get("name", ""), not bad, measured))
    return found


def sections(cases: Sequence[Case]) -> str:
    """Return all suites in Markdown: for each a heading, its text and a table."""
    return "\n\n".join(f"## {one.title}\n\n{one.text}\n\n{table(one, cases)}" for one in SUITES)


def table(suite: Suite, cases: Sequence[Case]) -> str:
    """Return the table of a suite, tried and held; it has a last column if a test measured something."""
    rows = []
    for row in suite.rows:
        own = _of(row, cases)
        rows.append([row.what, row.host, str(len(own)), str(sum(one.held for one in own)), _measured(own)])
    tried, held = (sum(int(row[column]) for row in rows) for column in (2, 3))
    rows.append(["**all**", "", f"**{tried}**", f"**{held}**", ""])
    head = [["what", "host", "tried", "held", "measured"], ["---", "---", "---:", "---:", "---"]]
    width = 5 if any(row[4] for row in rows) else 4
    return "\n".join("| " + " | ".join(row[:width]) + " |" for row in [*head, *rows])


def flaws(cases: Sequence[Case]) -> list[str]:
    """Return a line for each test that did not hold, and for each declared test that was not run."""
    found = []
    for suite in SUITES:
        for row in suite.rows:
            own = _of(row, cases)
            found += [f"{row.host}, {row.what}: {one.file}::{one.name}" for one in own if not one.held]
            missing = [test for test in row.tests if not any(one.is_of(test) for one in own)]
            found += [f"{row.host}, {row.what}: {test} was not run" for test in missing]
    return found


def _of(row: Row, cases: Sequence[Case]) -> list[Case]:
    return [one for one in cases if any(one.is_of(test) for test in row.tests)]


def _measured(cases: Sequence[Case]) -> str:
    values: dict[str, list[str]] = {}
    for case in cases:
        for name, value in case.measured:
            values.setdefault(name, []).append(value)
    return "; ".join(f"{name.replace('_', ' ')} {', '.join(found)}" for name, found in values.items())
