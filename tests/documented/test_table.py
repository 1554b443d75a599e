"""Each row of docs/documented-api.md names a test that exists, and each test of this folder has a row."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.tables import rows

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "documented-api.md"
VERDICTS = {"same", "mapped", "differs"}
ROWS = rows(PAGE)


@cache
def named_in(*folders: str) -> set[str]:
    return {
        node.name
        for folder in folders
        for path in (ROOT / "tests" / folder).rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_has_a_verdict_and_a_test_that_exists(row: list[str]) -> None:
    documented, verdict, _, *tests = row
    assert documented
    assert verdict in VERDICTS
    named = re.findall(r"`(test_\w+)`", " ".join(tests))
    assert named
    assert set(named) <= named_in("documented", "contract", "core")


def test_a_difference_is_explained() -> None:
    for documented, verdict, today, *_ in ROWS:
        assert today or verdict == "same", documented


def test_every_test_of_this_folder_is_named_in_a_row() -> None:
    here = {
        node.name for node in ast.parse(Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    own = named_in("documented") - here
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert own <= named, f"no row names {sorted(own - named)}"
