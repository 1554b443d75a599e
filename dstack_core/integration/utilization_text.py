"""How busy the machine of a run was, in the line and the chart that every engine shows."""

from __future__ import annotations

from typing import Any

from dstack_core.models.outcome import Outcome
from dstack_core.models.utilization import Utilization, format_gigabytes


def describe_utilization(usage: Utilization | None) -> str:
    """Return one line such as ``GPU 31 % mean, 97 % max; 11 of 80 GB``; an empty one without values.

    The GPU comes first; CPU and memory of the machine follow.
    """
    if usage is None:
        return ""
    parts = [
        _share("GPU", usage.gpu_mean, usage.gpu_max),
        _size("", usage.gpu_memory_peak, usage.gpu_memory_total),
        _share("CPU", usage.cpu_mean, usage.cpu_max),
        _size("memory ", usage.memory_peak, usage.memory_total),
    ]
    return "; ".join(part for part in parts if part)


def utilization_lines(outcome: Outcome) -> list[str]:
    """Return what the end of a run's log shows of its utilization: the line and the advice; none without.

    Example::

        for line in utilization_lines(outcome):
            logger.info("%s", line)
    """
    line = describe_utilization(outcome.utilization)
    if outcome.utilization is None or not line:
        return []
    return [f"Run {outcome.run_name} used {line}", *filter(None, [outcome.utilization.advice])]


def utilization_chart(data: Any) -> dict[str, str]:
    """Return what a page shows of a run's utilization: ``text``, ``advice``, and ``svg``, an SVG document.

    ``data`` is ``Utilization.to_dict()`` of this or another version and ``run_name`` (str) for the headline.
    Whatever it contains, the document has no script. Raises ``ValueError`` if it is something else.
    """
    try:
        usage = Utilization.from_dict(data)
        text = describe_utilization(usage)
        svg = usage.plot(f"Run {data['run_name']}").svg
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"utilization: expected that of a run, got something else ({error!r}).") from error
    return {"text": f"The run used {text}.", "advice": str(usage.advice), "svg": svg}


def _share(name: str, mean: float | None, most: float | None) -> str:
    if mean is None:
        return ""
    return f"{name} {mean:.0f} % mean" + ("" if most is None else f", {most:.0f} % max")


def _size(name: str, peak: int | None, total: int | None) -> str:
    if peak is None:
        return ""
    return f"{name}{format_gigabytes(peak)} " + (
        "GB" if total is None else f"of {format_gigabytes(total)} GB"
    )
