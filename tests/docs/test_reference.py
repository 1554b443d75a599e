"""The reference pages match the docstrings and leave no public name out."""

from __future__ import annotations

import pytest

import dstack_core
from scripts import make_reference, option_docs
from scripts.reference_pages import PAGES


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return make_reference.render_all()


def test_the_pages_are_up_to_date(rendered: dict[str, str]) -> None:
    there = {path.name: path.read_text() for path in make_reference.FOLDER.glob("*.md")}
    assert there.keys() == rendered.keys(), "run `make reference`"
    for name, text in rendered.items():
        assert there[name] == text, (
            f"docs/reference/{name} does not match the docstrings: run `make reference`"
        )


def test_every_public_name_is_on_a_page() -> None:
    shown = {path for page in PAGES for path in page.objects}
    missing = {f"dstack_core.{name}" for name in dstack_core.__all__} - shown - {"dstack_core.__version__"}
    assert not missing, f"add {sorted(missing)} to a page in scripts/make_reference.py"


def test_signatures_and_docstrings_are_shown(rendered: dict[str, str]) -> None:
    runs = rendered["runs.md"]
    assert "### RunCollection.submit()\n" in runs
    assert "    max_price: float | None = None,\n" in runs
    assert "Submit exactly one run and return it" in runs
    configurations = rendered["configurations.md"]
    assert "RegistryAuth(*, username: str, password: str)" in configurations
    assert "`ON_DEMAN = 'on-demand'`" in configurations


@pytest.mark.parametrize("target", option_docs.TARGETS, ids=lambda target: target.name)
def test_every_option_is_explained_where_options_are_spelled(target: option_docs.Target) -> None:
    assert option_docs.render(target) == target.path.read_text(), "run `make reference`"


DOCSTRING = """\
Wait for a thing.

Args:
    name: What it is called,
        on two lines.
    timeout, *more: Seconds.

Returns:
    The thing, after
    a while.

Raises:
    ValueError: It is wrong.

Example::

    for one in things:
        wait(one)

Source: a page.
"""
MARKDOWN = """\
Wait for a thing.

**Args**

* `name`: What it is called, on two lines.
* `timeout`, `*more`: Seconds.

**Returns**: The thing, after a while.

**Raises**

* `ValueError`: It is wrong.

**Example**

```python signature
for one in things:
    wait(one)
```

Source: a page.
"""


def test_the_sections_of_a_docstring_become_markdown() -> None:
    assert make_reference.as_markdown(DOCSTRING) == MARKDOWN


def test_text_before_code_keeps_one_colon() -> None:
    assert make_reference.as_markdown("As here::\n\n    code\n") == "As here:\n\n    code\n"


def test_an_example_is_one_block_however_it_is_quoted() -> None:
    block = "```python signature\nrun()\n```"
    assert make_reference.as_markdown("Example:\n    ``run()``\n") == f"**Example**\n\n{block}\n"
    fenced = "Example:\n    Run it:\n    ```python\n    run()\n    ```\n"
    assert make_reference.as_markdown(fenced) == f"**Example**\n\nRun it:\n\n{block}\n"
    sentence = "``@run`` above ``def train(): ...``"
    assert make_reference.as_markdown(f"Example:\n    {sentence}\n") == f"**Example**\n\n{sentence}\n"
