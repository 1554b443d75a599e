"""Report results, live numbers and files from inside a dstack run, where dstack-core is installed.

A run that dstack-core submitted with ``reports=True`` has the same functions without installing anything.
"""

from dstack_core._report.dstack_report import (
    Skipped,
    asset,
    checkpoint,
    image,
    is_active,
    link,
    metric,
    progress,
    result,
    skip,
    table,
)

__all__ = [
    "Skipped",
    "asset",
    "checkpoint",
    "image",
    "is_active",
    "link",
    "metric",
    "progress",
    "result",
    "skip",
    "table",
]
