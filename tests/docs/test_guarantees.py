"""Each row of docs/prefect-guarantees.md names tests that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.blocks import ROOT

ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "docs" / "prefect-guarantees.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| met ")
]
TESTS = {
    node.name
    for path in (ROOT / "tests" / "provider_prefect").glob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_guarantee_has_tests_that_exist(row: list[str]) -> None:
    met, here, tests = row
    assert met
    assert here
    named = set(re.findall(r"`(test_\w+)`", tests))
    assert named
    assert not named - TESTS
