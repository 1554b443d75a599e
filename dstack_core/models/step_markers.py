"""The marker of a step: that of step 1 with the step's number (``integration.step_ref``)."""

from __future__ import annotations

import re

_STEP = re.compile(r"(?P<first>.+)/step(?P<number>[2-9]|[1-9]\d+)")


def split_step(marker: str) -> tuple[str, int]:
    """Return the marker of a job's step 1 and the number of the step that has ``marker``.

    Example:
        ``split_step("airflow:etl/nightly/train/1of3#5f1c9a/step2")`` returns
        ``("airflow:etl/nightly/train/1of3#5f1c9a", 2)``.
    """
    step = _STEP.fullmatch(marker)
    return (marker, 1) if step is None else (step["first"], int(step["number"]))
