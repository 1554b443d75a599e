"""The staging of the pages and the check of the built site, without the generator."""

from __future__ import annotations

import runpy
import socket
from pathlib import Path

import pytest

from scripts import make_site
from scripts.check_site import check_site
from tests.docs.blocks import ROOT

_PAGE = '<html><body><h1 id="top">x</h1>{body}</body></html>'


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="#top">x</a><img src="a.png"><a href="https://dstack.ai">x</a>', ""),
        ('<script src="https://cdn.example.com/x.js"></script>', "https://cdn.example.com/x.js"),
        ('<link rel="stylesheet" href="//fonts.example.com/css">', "//fonts.example.com/css"),
        ('<link rel="preconnect" href="https://fonts.example.com">', "https://fonts.example.com"),
        ("<style>@import url(https://fonts.example.com/x)</style>", "https://fonts.example.com/x"),
        ('<img src="missing.png">', "missing.png"),
        ('<a href="#nowhere">x</a>', "#nowhere"),
        ('<a href="other/">x</a>', "other/"),
        ("<p>One\n* two</p>", "expected a list"),
        ("<pre>One\n* two</pre>", ""),
    ],
)
def test_the_check_finds_remote_addresses_missing_targets_and_unrendered_lists(
    body: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(_PAGE.format(body=body))
    (tmp_path / "a.png").touch()
    problems = check_site(tmp_path)
    assert len(problems) == (1 if problem else 0)
    assert not problem or problem in problems[0]


def test_an_address_in_a_style_sheet_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(_PAGE.format(body=""))
    (tmp_path / "x.css").write_text("a{src:url(//fonts.example.com/x.woff2)}")
    (problem,) = check_site(tmp_path)
    assert "//fonts.example.com/x.woff2" in problem


def test_a_site_without_pages_is_a_problem(tmp_path: Path) -> None:
    assert check_site(tmp_path)


def test_the_pages_of_the_repository_become_pages_of_the_site() -> None:
    gallery = make_site.page_for_site(ROOT / "docs" / "gallery.md")
    assert "](examples/dags/example_dstack_run.py.md)" in gallery
    contributing = make_site.page_for_site(ROOT / "CONTRIBUTING.md")
    assert "](docs/" not in contributing
    tutorial = make_site.page_for_site(ROOT / "docs" / "tutorials" / "airflow.md")
    assert "```python\n" in tutorial
    assert "```python airflow" not in tutorial
    assert "```text\n" in tutorial


def test_the_build_makes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname()).close()

    connect()
    monkeypatch.setattr(runpy, "run_module", connect)
    with pytest.raises(OSError, match="expected a build without network access"):
        make_site.run_mkdocs()
    connect()


def test_the_sections_of_docstrings_become_lists(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Do it.\n\nArgs:\n    name: The name,\n        in two lines.\n\nExample:\n    ```python\n    x\n    ```\n"
    )
    staged = make_site.page_for_site(page)
    assert "**Args**\n\n* `name`: The name,\n  in two lines.\n" in staged
    assert "**Example**\n\n```python\nx\n```\n" in staged


def test_a_list_right_after_a_line_gets_an_empty_line_before_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("One:\n* two\n  more\n* three\n```\na\n* b\n```\n")
    assert make_site.page_for_site(page) == "One:\n\n* two\n  more\n* three\n```\na\n* b\n```\n"


def test_titles_and_summaries_for_llms_txt() -> None:
    text = "<!-- Made -->\n# A title\n\n![x](y.png)\n\n```\ncode\n```\n\nSee [this](x.md) first. Then more.\n"
    assert make_site.title_and_summary(text) == ("A title", "See this first.")
    assert make_site.sections()[0] == ("Home", ["index.md"])
