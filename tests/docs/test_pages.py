"""The form of the how-to guides and of the troubleshooting page, and the navigation of the site."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import make_site
from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"
HOW_TO = sorted(path for path in (DOCS / "how-to").glob("*.md") if path.name != "README.md")
SOURCES = [ROOT / "dstack_core", *ROOT.glob("providers/*/src")]
_LITERAL = re.compile(r"^### `+(.+?)`+$", re.MULTILINE)
_MOST_LINES = 120


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_asks_one_question_and_answers_it_first(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# How to ")
    assert len(lines) <= _MOST_LINES
    # The answer precedes any heading, list, table or code.
    assert lines[1] == ""
    assert re.match(r"[A-Z`]", lines[2]), (
        f"{page.name}: expected a sentence after the title, got {lines[2]!r}"
    )
    assert sum(line.startswith("# How to ") for line in lines) == 1


def test_every_how_to_is_in_the_index() -> None:
    index = (DOCS / "how-to" / "README.md").read_text()
    assert {page.name for page in HOW_TO} == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = [page for _, pages in make_site.sections() for page in pages]
    assert len(listed) == len(set(listed))
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    beside = {target for target in make_site.PAGES_OUTSIDE.values() if target != "index.md"}
    assert set(listed) == there | beside


def test_every_example_is_in_the_gallery() -> None:
    gallery = (DOCS / "gallery.md").read_text()
    for path in make_site.examples():
        assert f"](../{path.relative_to(ROOT)})" in gallery, path


def texts_of_the_code() -> Iterator[str]:
    """Yield the strings of the sources, except docstrings, with ``...`` for what is filled in."""
    for folder in SOURCES:
        for path in folder.rglob("*.py"):
            yield from _texts(ast.parse(path.read_text()))


def _texts(tree: ast.Module) -> Iterator[str]:
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out.update(id(part) for part in node.values)
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield re.sub(r"%[.\d]*[a-z]", "...", node.value)


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    texts = list(texts_of_the_code())
    literals = _LITERAL.findall((DOCS / "troubleshooting.md").read_text())
    assert len(literals) > 25
    missing = [literal for literal in literals if not any(literal in text for text in texts)]
    assert not missing, f"no message of the code has {missing}: correct the page to match the code"


def test_a_text_that_no_code_has_is_found() -> None:
    assert not any("a message that was changed" in text for text in texts_of_the_code())
    assert list(_texts(ast.parse('"""Docs."""\nraise ValueError(f"a {b} c" " d")'))) == ["a ... c d"]
