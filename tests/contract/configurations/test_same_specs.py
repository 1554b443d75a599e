"""What our client sends for a `.dstack.yml` is what dstack's own client sends.

`DSTACK_TEST_CONFIGURATIONS` is how many configurations of each type are generated. The default ones are always the
same; with more, they are new ones each time, and a failure prints how to get the same again.
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
# Where our client does otherwise on purpose; docs/configurations.md says the same to its readers.
WANTED = {
    "one command that is no list": "the documented API takes one command as a text",
    "working_dir relative": "the documented API takes a path relative to the code's directory",
    "env: a mapping without a value": "it says what a name alone says in a list; dstack takes that in a list alone",
    "env: a value of several lines": "a private key has several lines; dstack takes them in a mapping alone",
    "references: an escaped dollar without a reference": "`kill $$` is a shell's, and not to be sent as `kill $`",
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
    assert missing == [], "write down in forms.py what these texts may be"


def test_the_comparison_finds_a_difference(official: OfficialClient, folder: Path) -> None:
    """The comparison itself is compared: a client that read 16GB as at least 16 GB would fail it."""
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
