"""Run the declared suites with pytest, and make tables for the page of their junit reports."""

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
    """Hold one test as its report tells it; ``held`` is false too where it was skipped."""

    file: str
    name: str
    held: bool
    measured: tuple[tuple[str, str], ...] = ()

    def is_of(self, test: str) -> bool:
        """Tell whether a row's ``test``, a file or a node id with or without its parameters, means this one."""
        file, _, name = test.partition("::")
        return file == self.file and name in ("", self.name, self.name.partition("[")[0])


def run(environment: str, report: Path) -> int:
    """Run the tests of all suites that belong to one environment; the report is written whatever they do."""
    tests = list(dict.fromkeys(test for suite in SUITES for test in suite.tests(environment)))
    if not tests:
        return 0
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
    return subprocess.run(command, check=False).returncode


def read(reports: Iterable[Path]) -> list[Case]:
    """Return the tests of junit reports; one that is not there, or was not written to its end, has none."""
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
            spoiled = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
            found.append(Case(case.get("file", ""), case.get("name", ""), not spoiled, measured))
    return found


def sections(cases: Sequence[Case]) -> str:
    """Return all suites in markdown, a heading, the text and a table each."""
    return "\n\n".join(f"## {one.title}\n\n{one.text}\n\n{table(one, cases)}" for one in SUITES)


def table(suite: Suite, cases: Sequence[Case]) -> str:
    """Return what was tried and held; the last column is there where a test measured something."""
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
    """Return a line for each test that did not hold, and for each row that none of its tests was run for."""
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
