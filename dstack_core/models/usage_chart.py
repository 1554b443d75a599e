"""A chart of what a run used: SVG and HTML without any library, PNG where matplotlib is installed.

The problem: the chart is shown in notebooks, in the pages of two workflow engines and in files. A plotting
library would be the largest dependency of a package that a DAG file imports.

The idea: a chart is data, a few panels of lines over the same time, and each form is written from it. The SVG
has no script, no link and no font of its own; every text is escaped, so it is safe wherever an image is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core.models.records import Metric
    from dstack_core.models.utilization import RunMetrics, Utilization

# Pixels: a column of text in a notebook or in the pages of Airflow and Prefect.
_WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 44, 30
_PANEL, _GAP = 96, 40
# Of the Okabe-Ito palette, which color-blind readers can distinguish.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Beyond these, a legend hides the lines; the others are drawn without a name.
_NAMED_LINES = 8
GIGABYTE = 2**30
"""The bytes of a GB as dstack and GPU vendors count it."""
_EMPTY = "No values yet: a server has them once a job has run for about 20 seconds."
# Seconds, and times the usual distance of two values: a longer pause is a gap, such as the one between two
# attempts of a run. A server measures every ten seconds and may miss some.
_LEAST_GAP, _GAP_SHARE = 60.0, 4.0
_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400)


@dataclass(frozen=True, slots=True)
class ChartLine:
    """One line: its name, and its points as ``(seconds since the epoch, value)``; None is a gap."""

    name: str
    points: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True, slots=True)
class ChartPanel:
    """Lines over one axis, which goes from 0 to ``top`` in ``unit``."""

    title: str
    unit: str
    top: float
    lines: tuple[ChartLine, ...]


@dataclass(frozen=True, slots=True)
class UsageChart:
    """A chart of what a run used; a notebook shows it, and ``save`` writes it to a file.

    Attributes:
        title: Its headline.
        panels: Its panels, from top to bottom.
    """

    title: str
    panels: tuple[ChartPanel, ...]

    @property
    def svg(self) -> str:
        """The chart as an SVG document (str)."""
        return _svg(self)

    @property
    def data_uri(self) -> str:
        """The SVG as an address that a page or Markdown can show as an image."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()

    def to_png(self) -> bytes:
        """Return the chart as a PNG image.

        Raises ``ConfigurationError`` if matplotlib is not installed.
        """
        return _png(self)

    def save(self, path: str | Path) -> None:
        """Write the chart to a file: ``.svg``, ``.html``, or ``.png`` if matplotlib is installed.

        Raises ``ConfigurationError`` for another ending, or for PNG without matplotlib; ``OSError``.
        """
        target = Path(path)
        match target.suffix.lower():
            case ".svg":
                target.write_text(self.svg, encoding="utf-8")
            case ".html" | ".htm":
                head = f'<!doctype html><meta charset="utf-8"><title>{escape(self.title)}</title>'
                target.write_text(head + self.svg, encoding="utf-8")
            case ".png":
                target.write_bytes(self.to_png())
            case ending:
                raise ConfigurationError(f"path: expected .svg, .html or .png at its end, got {ending!r}.")

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        # As an image, so that the styles of the page do not change it.
        return f'<img alt="{escape(self.title)}" src="{self.data_uri}">'


def summary_chart(usage: Utilization, title: str) -> UsageChart:
    """Return the chart of a summary: one line for each of GPU, GPU memory, CPU and memory."""
    series = usage.series

    def line(values: Sequence[float | None], scale: float = 1.0) -> tuple[ChartLine, ...]:
        points = [
            (time, None if value is None else value / scale)
            for time, value in zip(series.times, values, strict=True)
        ]
        return (ChartLine("", tuple(points)),) if any(value is not None for _, value in points) else ()

    gpu = f"{usage.gpu} " if usage.gpu else ""
    count = f" ({usage.gpus} {gpu}GPUs)" if usage.gpus > 1 else f" ({usage.gpu})" if usage.gpu else ""
    return UsageChart(
        title,
        _panels(
            [
                (f"GPU{count}", "%", line(series.gpu_percent), 100.0),
                ("GPU memory", "GB", line(series.gpu_memory_bytes, GIGABYTE), usage.gpu_memory_total),
                ("CPU", "%", line(series.cpu_percent), 100.0),
                ("Memory", "GB", line(series.memory_bytes, GIGABYTE), usage.memory_total),
            ]
        ),
    )


def metrics_chart(metrics: RunMetrics, title: str) -> UsageChart:
    """Return the chart of all series: a line for each GPU of each job."""
    summary = metrics.summary()
    several = len({(each.node, each.replica) for each in metrics}) > 1
    cpus = {
        (each.node, each.replica): each.values[-1]
        for each in metrics
        if each.name == "cpus_detected_num" and each.values
    }

    def lines(start: str, scale: float = 1.0, *, per_cpu: bool = False) -> tuple[ChartLine, ...]:
        chosen = [each for each in metrics if each.name.startswith(start) and each.values]
        made = []
        for each in chosen:
            divisor = scale
            if per_cpu:
                divisor = cpus.get((each.node, each.replica)) or metrics.hardware.cpus or 1.0
            points = [
                (moment.timestamp(), value / divisor)
                for moment, value in zip(each.timestamps, each.values, strict=True)
            ]
            made.append(ChartLine(_line_name(each, several), tuple(points)))
        return tuple(made)

    gpu = f" ({metrics.hardware.gpu})" if metrics.hardware.gpu else ""
    return UsageChart(
        title,
        _panels(
            [
                (f"GPU{gpu}", "%", lines("gpu_util_percent_gpu"), 100.0),
                (
                    "GPU memory",
                    "GB",
                    lines("gpu_memory_usage_bytes_gpu", GIGABYTE),
                    summary.gpu_memory_total,
                ),
                ("CPU", "%", lines("cpu_usage_percent", per_cpu=True), 100.0),
                ("Memory", "GB", lines("memory_working_set_bytes", GIGABYTE), summary.memory_total),
            ]
        ),
    )


def _line_name(metric: Metric, several: bool) -> str:
    gpu = f"GPU {metric.name.rpartition('gpu')[2]}" if metric.name.startswith("gpu_") else ""
    job = f"node {metric.node}" if several else ""
    job = f"replica {metric.replica} {job}" if several and metric.replica else job
    return ", ".join(part for part in (job, gpu) if part)


def _panels(
    wanted: Iterable[tuple[str, str, tuple[ChartLine, ...], float | None]],
) -> tuple[ChartPanel, ...]:
    panels = []
    for title, unit, lines, limit in wanted:
        if not lines:
            continue
        highest = max((value for line in lines for _, value in line.points if value is not None), default=0.0)
        whole = limit / GIGABYTE if unit == "GB" and limit else limit
        # A share of all is shown as a share of all; without a total the highest value fills the panel.
        panels.append(ChartPanel(title, unit, max(whole or 0.0, highest) or 1.0, lines))
    return tuple(panels)


def _span(chart: UsageChart) -> tuple[float, float]:
    times = [time for panel in chart.panels for line in panel.lines for time, _ in line.points]
    return (min(times), max(times)) if times else (0.0, 0.0)


def _svg(chart: UsageChart) -> str:
    count = len(chart.panels)
    height = _TOP + max(count * (_PANEL + _GAP) - _GAP, 20) + _BOTTOM + 16
    start, end = _span(chart)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{_text(chart.title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18" font-size="14" font-weight="600" fill="#222">{_text(chart.title)}</text>',
    ]
    if not chart.panels:
        parts.append(f'<text x="{_LEFT}" y="{_TOP}" fill="#555">{_EMPTY}</text>')
    for index, panel in enumerate(chart.panels):
        parts += _panel(panel, _TOP + index * (_PANEL + _GAP), start, end)
    if chart.panels:
        parts += _time_axis(_TOP + count * (_PANEL + _GAP) - _GAP, start, end)
    return "".join([*parts, "</svg>"])


def _panel(panel: ChartPanel, top: float, start: float, end: float) -> list[str]:
    width = _WIDTH - _LEFT - _RIGHT
    parts = [f'<text x="{_LEFT}" y="{top - 7}" fill="#222">{_text(panel.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = top + _PANEL * (1 - share)
        parts.append(
            f'<line x1="{_LEFT}" y1="{y:g}" x2="{_LEFT + width}" y2="{y:g}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:g}" text-anchor="end" fill="#555">'
            f"{panel.top * share:.3g} {panel.unit}</text>"
        )
    legend = _LEFT + width
    named = [line for line in panel.lines if line.name] if len(panel.lines) <= _NAMED_LINES else []
    for index, line in reversed(list(enumerate(panel.lines))):
        color = _COLORS[index % len(_COLORS)]
        for piece in _pieces(line):
            drawn = [
                (
                    _LEFT + (width * (time - start) / (end - start) if end > start else width / 2),
                    top + _PANEL * (1 - min(max(value / panel.top, 0.0), 1.0)),
                )
                for time, value in piece
            ]
            if len(drawn) == 1:
                parts.append(f'<circle cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="2" fill="{color}"/>')
            else:
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
                parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5" '
                    'stroke-linejoin="round"/>'
                )
        if line in named:
            parts.append(
                f'<text x="{legend}" y="{top - 7}" text-anchor="end" fill="{color}">{_text(line.name)}</text>'
            )
            legend -= 7 * len(line.name) + 14
    return parts


def _pieces(line: ChartLine) -> list[list[tuple[float, float]]]:
    """Return the line cut at its gaps: where a value is missing, or none was measured for long."""
    times = [time for time, _ in line.points]
    steps = sorted(later - earlier for earlier, later in pairwise(times))
    longest = max(_LEAST_GAP, _GAP_SHARE * steps[len(steps) // 2]) if steps else _LEAST_GAP
    pieces: list[list[tuple[float, float]]] = [[]]
    for time, value in line.points:
        if value is None or (pieces[-1] and time - pieces[-1][-1][0] > longest):
            pieces.append([])
        if value is not None:
            pieces[-1].append((time, value))
    return [piece for piece in pieces if piece]


def _time_axis(y: float, start: float, end: float) -> list[str]:
    width, span = _WIDTH - _LEFT - _RIGHT, end - start
    step = next((each for each in _STEPS if span / each <= 6), _STEPS[-1] * (1 + int(span / _STEPS[-1] / 6)))
    parts = []
    for number in range(int(span / step) + 1):
        x = _LEFT + (width * number * step / span if span else width / 2)
        parts.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 4}" stroke="#999"/>')
        label = _clock(number * step)
        parts.append(f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle" fill="#555">{label}</text>')
    where = f'x="{_LEFT + width}" y="{y + 34}" text-anchor="end" fill="#777"'
    return [*parts, f"<text {where}>time since the first value</text>"]


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{minutes} min" if minutes and not rest else f"{minutes * 60 + rest} s"


def _text(text: str) -> str:
    # A control character would make the document malformed.
    return escape("".join(each if each.isprintable() else " " for each in text))


def _png(chart: UsageChart) -> bytes:
    try:
        figures: Any = import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigurationError(
            "to_png: expected matplotlib, which is not installed. Run: pip install matplotlib, or save the "
            "chart as .svg."
        ) from error
    start, end = _span(chart)
    # A dollar sign would begin a formula.
    title = chart.title.replace("$", r"\$")
    figure = figures.Figure(
        figsize=(_WIDTH / 100, 0.8 + 1.5 * max(len(chart.panels), 0.4)), dpi=144, layout="constrained"
    )
    figure.suptitle(title)
    if not chart.panels:
        figure.text(0.5, 0.4, _EMPTY, ha="center", va="center")
    else:
        axes = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, chart.panels, strict=True):
            _png_panel(axis, panel, start)
        # One value has no span; around it matplotlib would show negative times.
        axes[-1].set_xlim(0, max((end - start) / 60, 1.0))
        axes[-1].set_xlabel("minutes since the first value")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _png_panel(axis: Any, panel: ChartPanel, start: float) -> None:
    for index, line in enumerate(panel.lines):
        for number, piece in enumerate(_pieces(line)):
            axis.plot(
                [(time - start) / 60 for time, _ in piece],
                [value for _, value in piece],
                label=line.name if line.name and not number else None,
                color=_COLORS[index % len(_COLORS)],
                marker="o" if len(piece) == 1 else None,
                markersize=4,
            )
    # Lines at either end would otherwise be half as thick.
    axis.set_ylim(-0.02 * panel.top, 1.02 * panel.top)
    axis.set_title(panel.title, loc="left", fontsize="medium")
    axis.set_ylabel(panel.unit)
    if 1 < len(panel.lines) <= _NAMED_LINES:
        axis.legend(loc="upper right", fontsize="small")
