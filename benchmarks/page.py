"""Write ``docs/performance.md`` and its plots from the measurements."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

from benchmarks.results import Curve, Row, Section

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "build/bench"
DOCS = ROOT / "docs"
_REACHED = {True: "reached", False: "**not reached**", None: ""}


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def summary(sections: Iterable[Section]) -> str:
    """Return the table of the rows of all sections."""

    def line(row: Row) -> list[str]:
        return [row.what, row.ours, row.against, row.ratio, row.target, _REACHED[row.reached]]

    head = ["what", "here", "against", "ratio", "target", ""]
    return table(head, [line(row) for section in sections for row in section.rows])


def details(section: Section) -> str:
    """Return the tables, notes and plots behind the rows of one section."""
    parts = [f"## {section.title}", *section.notes]
    for one in section.tables:
        parts += [f"{one.title}:", table(one.head, one.lines)]
    parts += [f"![{curve.title}](images/{curve.file})" for curve in section.curves]
    return "\n\n".join(parts)


def plot(curve: Curve) -> None:
    """Draw one curve, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    for name, points in curve.series.items():
        axes.plot(*zip(*sorted(map(tuple, points)), strict=True), marker="o", label=name)
    if curve.limit is not None:
        axes.axhline(curve.limit, linestyle="--", color="grey", label="target")
    axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y, xscale="log", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    (DOCS / "images").mkdir(exist_ok=True)
    figure.savefig(DOCS / "images" / curve.file, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Write the page; name the modules that were not measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    found = {name: REPORTS / f"{name}.json" for name in chosen.modules}
    sections = [Section.load(path) for path in found.values() if path.exists()]
    missing = [name for name, path in found.items() if not path.exists()]
    for section in sections:
        for curve in section.curves:
            plot(curve)
    rows = [row for section in sections for row in section.rows if row.reached is not None]
    reached = sum(row.reached is True for row in rows)
    cores = os.cpu_count()
    parts = [
        "# Performance",
        "`make bench` writes this page (`make bench-quick` uses smaller sizes). Every comparison is measured side by "
        "side in one run.",
        f"Measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {cores} cores, Python {platform.python_version()}, "
        f"{'smaller sizes' if chosen.quick else 'full sizes'}. {reached} of {len(rows)} targets reached.",
        *([f"Not measured this time: {', '.join(missing)}."] if missing else []),
        summary(sections),
        *map(details, sections),
    ]
    (DOCS / "performance.md").write_text("\n\n".join(parts) + "\n")
    print(f"   {reached} of {len(rows)} targets reached; see docs/performance.md")


if __name__ == "__main__":
    main()
