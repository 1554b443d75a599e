"""Our client sends the same for a `.dstack.yml` as dstack's own client.

`DSTACK_TEST_CONFIGURATIONS` sets how many configurations of each type are generated. By default they are always the
same; with a larger number they are new each time, and a failure prints how to reproduce it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.contract.configurations.clients import JUDGE_VERSION, Case, OfficialClient, differences
from tests.contract.configurations.forms import configurations, text_for, texts_in
from tests.contract.configurations.named import NAMED
from tests.rig.server_process import DEFAULT_VERSION

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(DEFAULT_VERSION != JUDGE_VERSION, reason="no server is asked: once is enough"),
]

KINDS = ("task", "service", "dev-environment")
FEW = 150
EXAMPLES = int(os.environ.get("DSTACK_TEST_CONFIGURATIONS", FEW))
# Intended differences of our client; docs/configurations.md explains them to its readers.
WANTED = {
    "one command that is not a list": "the documented API takes one command as a text",
    "working_dir relative": "the documented API takes a path relative to the code's directory",
    "env: a mapping without a value": "it means the same as a name alone in a list; dstack accepts that in a list only",
    "env: a value of several lines": "a private key has several lines; dstack accepts them in a mapping only",
    "references: an escaped dollar without a reference": "`kill $$` belongs to the shell and must not be sent as `kill $`",
    "files: an empty path": "it is not clear where the file would go",
}
ENV = {"A": "a value", "HF_TOKEN": "a token"}


@pytest.mark.parametrize("name", NAMED)
def test_each_named_configuration_is_read_as_dstack_reads_it(
    name: str, official: OfficialClient, folder: Path
) -> None:
    found = differences(NAMED[name], folder, official)
    if name in WANTED:
        assert found, f"there is no difference any more: {WANTED[name]}"
    else:
        assert found == []


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_the_schema_is_read_as_dstack_reads_it(
    kind: str, official: OfficialClient, folder: Path
) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES == FEW,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(configurations(kind, official.schema(kind)))
    def compare(text: str) -> None:
        assert differences(Case(text, env=ENV), folder, official) == []

    compare()


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_of_the_schema_has_a_meaning(kind: str, official: OfficialClient) -> None:
    missing = [text for text in texts_in(official.schema(kind)) if text_for(*text) is None]
    assert missing == [], "add to TEXTS in forms.py what these texts may be"


def test_the_comparison_finds_a_difference(official: OfficialClient, folder: Path) -> None:
    """Check the comparison itself: it would fail a client that read 16GB as at least 16 GB."""
    case = Case("type: task\ncommands: [x]\nresources: {gpu: 16GB}\n")
    path = folder / ".dstack.yml"
    path.write_text(case.text)
    theirs = official.send(path, case)
    assert theirs.spec is not None
    assert theirs.spec["configuration"]["resources"]["gpu"]["memory"] == {"min": 16.0, "max": 16.0}
    theirs.spec["configuration"]["resources"]["gpu"]["memory"]["max"] = None
    read = official.read(theirs.spec)
    assert read.spec is not None
    assert read.spec["configuration"]["resources"]["gpu"]["memory"] == {"min": 16.0, "max": None}
