"""Read the tables of the documentation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path


def rows(page: Path) -> list[list[str]]:
    """Return the cells of all rows of a page's tables, without the header rows, which have a rule below."""
    lines = page.read_text().splitlines()
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line, below in pairwise([*lines, ""])
        if line.startswith("| ") and not below.startswith("|--")
    ]
