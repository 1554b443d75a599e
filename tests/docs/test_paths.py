"""The modules that a page names exist, and the walk of a submit is the one that a submit takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import walks
from tests.docs.blocks import ROOT

PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "docs/how-it-works.md", ROOT / "docs/integrate-an-engine.md")
PLACES = (ROOT, walks.CORE, walks.AIRFLOW, walks.PREFECT, walks.AIRFLOW.parent, walks.PREFECT.parent)
_MODULE = re.compile(r"`([\w/.-]+\.py)`")
_STEP = re.compile(r"^\d+\. (.*?)(?=^\d+\. |^$)", re.MULTILINE | re.DOTALL)


def modules_in(text: str) -> list[str]:
    return _MODULE.findall(text)


def section(page: Path, title: str) -> str:
    _, _, rest = page.read_text().partition(f"### {title}\n")
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modules_that_a_page_names_exist(page: Path) -> None:
    named = modules_in(page.read_text())
    assert named or page.name == "integrate-an-engine.md"
    everywhere = {path.name for place in (ROOT / "tests", ROOT / "scripts") for path in place.rglob("*.py")}
    assert [
        name
        for name in named
        if not any((place / name).exists() for place in PLACES) and name not in everywhere
    ] == []


def test_the_walk_of_a_submit_names_the_files_it_passes() -> None:
    (walk,) = walks.submit()
    passed = {str(Path(file).relative_to(walks.CORE)) for file in walk.files}
    steps = _STEP.findall(section(ROOT / "docs/how-it-works.md", "A submit"))
    assert len(steps) > 3
    assert {name for step in steps for name in modules_in(step)} == passed
