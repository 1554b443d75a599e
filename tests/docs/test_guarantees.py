"""Each row of docs/prefect-guarantees.md and docs/security.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.docs.tables import rows

DOCS, TESTS = ROOT / "docs", ROOT / "tests"


def names_in(folder: Path) -> set[str]:
    """Return the names of all tests below a folder."""
    return {
        node.name
        for path in folder.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


PAGES = [
    ("prefect-guarantees.md", names_in(TESTS / "provider_prefect") | names_in(TESTS / "core")),
    ("security.md", names_in(TESTS)),
]
CASES = [
    pytest.param(row, known, id=f"{page}-{row[0][:60]}") for page, known in PAGES for row in rows(DOCS / page)
]


@pytest.mark.parametrize(("row", "known"), CASES)
def test_a_guarantee_has_tests_that_exist(row: list[str], known: set[str]) -> None:
    met, here, tests = row
    assert met
    assert here
    named = set(re.findall(r"`(test_\w+)`", tests))
    assert named
    assert not named - known


def test_the_pages_have_rows() -> None:
    assert all(len(rows(DOCS / page)) > 20 for page, _ in PAGES)
