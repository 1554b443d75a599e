"""The result of a measurement: plain data, because each measurement runs in its own environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the first table; ``reached`` is None if the figure has no target."""

    what: str
    ours: str
    against: str
    ratio: str = ""
    target: str = "none"
    reached: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """The figures behind the rows."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A plot: ``series`` holds (x, y) points by name; ``limit`` is a line the curves should stay under."""

    file: str
    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    limit: float | None = None


@dataclass(slots=True)
class Section:
    """The measurements of one module; ``notes`` explain the method, and why a target was missed."""

    title: str
    rows: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote."""
        data: dict[str, Any] = json.loads(path.read_text())
        return cls(
            data["title"],
            [Row(**row) for row in data["rows"]],
            [Table(**table) for table in data["tables"]],
            [Curve(**curve) for curve in data["curves"]],
            data["notes"],
        )


def cli(measure: Callable[[bool], Section]) -> None:
    """Run the command line of one module: measure, and print or save the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--out", type=Path, help="where to save the section as JSON")
    chosen = parser.parse_args()
    section = measure(chosen.quick)
    for row in section.rows:
        told = {True: "reached", False: "NOT reached", None: ""}[row.reached]
        print(f"  {row.what}: {row.ours} | {row.against} | {row.ratio} | {row.target} {told}", flush=True)
    if chosen.out is None:
        print(json.dumps(asdict(section), indent=1))
    else:
        section.save(chosen.out)
