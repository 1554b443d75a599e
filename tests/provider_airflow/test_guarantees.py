"""Each row of docs/airflow-guarantees.md names tests that exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from airflow.sdk import BaseOperator

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Task
from tests.docs.tables import rows

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "airflow-guarantees.md"
ROWS = rows(PAGE)
TESTS = {
    node.name
    # What both providers show of a log or keep of an attempt is tested with the core, a hold with every server.
    for path in [
        *HERE.glob("test_*.py"),
        HERE.parent / "core" / "test_relay.py",
        HERE.parent / "core" / "test_checkpoint.py",
        HERE.parent / "contract" / "test_hold.py",
    ]
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_describes_what_happens_and_names_tests_that_exist(row: list[str]) -> None:
    met, here, tests = row
    assert met
    assert here
    named = re.findall(r"`(test_\w+)`", tests)
    assert named
    assert set(named) <= TESTS


def test_what_the_text_names_exists_too() -> None:
    assert set(re.findall(r"`(test_\w+)`", PAGE.read_text())) <= TESTS


def test_the_parameters_in_the_kubernetes_operator_table_exist() -> None:
    page = (PAGE.parent / "airflow.md").read_text()
    _, _, section = page.partition("## Coming from KubernetesPodOperator\n")
    cells = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
    named = {name for cell in cells for name in re.findall(r"`([a-z_]+)\b", cell)}
    known = {
        *inspect.signature(DstackRunOperator.__init__).parameters,
        *inspect.signature(BaseOperator.__init__).parameters,
        *Task.model_fields,
    }
    assert len(named) > 20
    assert named <= known
