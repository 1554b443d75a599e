"""The tables of the suites beside the matrix, made from junit reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import junit
from tests.faults.report import ROOT
from tests.faults.suites import SUITES, Row, Suite

SUITE = Suite(
    "Odd things",
    "Held means held.",
    (
        Row("one", "core", "core", ("tests/a.py::test_one", "tests/a.py::test_two[x]")),
        Row("all of a file", "core", "core", ("tests/b.py",)),
        Row("never run", "Prefect", "prefect", ("tests/c.py::test_gone",)),
    ),
)
REPORT = """<testsuites><testsuite>
<testcase file="tests/a.py" name="test_one[1]"><properties><property name="lines_a_second" value="9"/></properties></testcase>
<testcase file="tests/a.py" name="test_one[2]"><failure message="x"/></testcase>
<testcase file="tests/a.py" name="test_two[x]"><skipped/></testcase>
<testcase file="tests/a.py" name="test_two[y]"><failure/></testcase>
<testcase file="tests/b.py" name="test_any"/>
</testsuite></testsuites>"""


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[junit.Case]:
    monkeypatch.setattr(junit, "SUITES", [SUITE])
    report, cut = tmp_path / "report.xml", tmp_path / "cut.xml"
    report.write_text(REPORT)
    cut.write_text(REPORT[:-40])
    return junit.read([report, cut, tmp_path / "missing.xml"])


def test_a_row_counts_its_own_tests_and_skipped_ones_did_not_hold(cases: list[junit.Case]) -> None:
    assert junit.table(SUITE, cases).splitlines() == [
        "| what | host | tried | held | measured |",
        "| --- | --- | ---: | ---: | --- |",
        "| one | core | 3 | 1 | lines a second 9 |",
        "| all of a file | core | 1 | 1 |  |",
        "| never run | Prefect | 0 | 0 |  |",
        "| **all** |  | **4** | **2** |  |",
    ]


def test_reports_what_failed_was_skipped_or_never_ran(cases: list[junit.Case]) -> None:
    assert junit.flaws(cases) == [
        "core, one: tests/a.py::test_one[2]",
        "core, one: tests/a.py::test_two[x]",
        "Prefect, never run: tests/c.py::test_gone was not run",
    ]


def test_every_declared_test_exists() -> None:
    for test in {test for suite in SUITES for row in suite.rows for test in row.tests}:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text() or not name, test
