"""docs/outcome.md shows the fields of an outcome, each with its type, meaning and label."""

from __future__ import annotations

from dstack_core.integration import OUTCOME_FIELDS
from tests.docs.blocks import ROOT
from tests.docs.tables import rows


def test_the_table_has_every_field_of_an_outcome() -> None:
    expected = [
        [
            f"`{field.name}`",
            ", ".join(f"`{kind}`" for kind in field.type.split(" | ")),
            field.meaning,
            field.label,
        ]
        for field in OUTCOME_FIELDS
    ]
    assert rows(ROOT / "docs" / "outcome.md") == expected
