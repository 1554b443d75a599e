"""No page contains a word or phrase that readers stumble over; the source files follow folder by folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.docs.voice import (
    CLASS_RULE,
    PAGES,
    RULES,
    Passage,
    Rule,
    findings_in,
    page_findings,
    page_passages,
    source_files,
    source_findings,
)

# Files and folders whose docstrings, comments, messages and test names follow the rules. Append to it; when it
# holds all of SOURCE_FOLDERS, the whole repository does.
SWEPT: tuple[str, ...] = (
    "benchmarks",
    "dags",
    "dstack_core",
    "dstack_report",
    "flows",
    "providers",
    "scripts",
    "tests",
)

# Each rule finds these, in the order of RULES.
BROKEN = [
    "Each look takes one request.",
    "It looks at the run again.",
    "The task is told of the end.",
    "The log says why.",
    "A failing server is borne for a minute.",
    "After a silent server answers, it continues.",
    "A spoiled reply counts as a failure.",
    "When the run is over, the trigger fires.",
    "The run comes to its end.",
    "The run goes on without the task.",
    "Nobody stops it.",
    "The link leads nowhere.",
    "Another process takes the watching over.",
    "A dev environment is no task.",
    "An address that is none of the server's.",
    "It stores how far it came.",
    "It stores its place in the log.",
    "The run was asked to stop.",
    "This is a run that may be left.",
    "The task shows the run's last words.",
    "Odd lines are shown as well as can be.",
    "It waits for ever.",
    "It retries. Does Airflow not answer, the run keeps running.",
]
FINE = [
    "Look up the name, then look for offers.",
    "It looks like a path.",
    "The connection is over SSH, the log is over 5 MB, and the reply is over the limit.",
    "There is no such run, and the token is no longer valid.",
    "The bearer token has a bearable length.",
    "The value is None, the user is `nobody`, and the option is ``--tell``.",
    "A machine with, say, 16 GB.",
    "Is the server running? If so, go to the next step.",
    "Should it fail?",
    "See [the page](https://example.com/nobody/told) or https://example.com/goes/on.",
    "Put the option on the command line.",
    "```shell\necho nobody told me\n```\n",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_reads_well(page: Path) -> None:
    assert [str(found) for found in page_findings(page)] == []


@pytest.mark.parametrize("path", source_files(*SWEPT), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_swept_source_file_reads_well(path: Path) -> None:
    assert [str(found) for found in source_findings(path)] == []


@pytest.mark.parametrize(("rule", "text"), list(zip(RULES, BROKEN, strict=True)), ids=BROKEN)
def test_each_rule_finds_its_phrase(rule: Rule, text: str) -> None:
    found = findings_in(Passage(ROOT / "README.md", 1, "page", text))
    assert [one.instead for one in found] == [rule.instead]


@pytest.mark.parametrize("text", FINE)
def test_good_sentences_and_code_pass(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert [found for passage in page_passages(page) for found in findings_in(passage)] == []


SOURCE = '''\
"""Tell what a module is."""

import logging


class Holder:
    """Hold a value."""


def test_nobody_waits() -> None:
    # The run goes on
    # and nobody waits; `nobody` in code is fine.
    logging.warning("The run %s is over: %s", 1, "nobody")
    name = "nobody"
    raise ValueError(f"{name} is no name of a run")


def check(value: int) -> None:
    if value < 0:
        raise ValueError(f"value: expected 0 or more, got {value}.")
    raise ValueError(f"{value} does not fit here")
'''


def test_every_kind_of_text_of_a_source_file_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.docs.voice.ROOT", tmp_path)
    path = tmp_path / "scripts" / "module.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    found = {(one.passage.kind, one.line, one.words) for one in source_findings(path)}
    assert found == {
        ("docstring", 1, "Tell"),
        ("class docstring", 7, "Hold"),
        ("test name", 10, "nobody"),
        ("comment", 11, "goes on"),
        ("comment", 12, "nobody"),
        ("message", 13, "is over"),
        ("message", 15, "is no name"),
        ("error form", 15, "`x` is no name of a run"),
        ("error form", 21, "`x` does not fit here"),
    }


def test_a_class_docstring_begins_with_a_noun() -> None:
    assert CLASS_RULE.pattern.search("Hold one run.")
    assert not CLASS_RULE.pattern.search("A handle to one run.")
    assert not CLASS_RULE.pattern.search("Names of runs.")


def test_the_groups_are_not_empty() -> None:
    assert len(PAGES) > 15
    assert len(source_files()) > 400
