"""How busy the machine of a run was: the measured series, and their summary.

The problem: a server keeps a value in ten seconds, 360 an hour for each GPU and node, and drops the values of
a running job after an hour. What is kept with an outcome must be small and cover the whole run.

The idea: ``Utilization`` holds a short series of its own, at most 60 points, with the number of measured
values behind each. Two of them, for the first hour and for the second, merge into one, and the means of the
result are those of all values. Maxima are kept beside it, since a mean of a minute hides them.

The units are those of the server (PROTOCOL 1.9), except for the CPU: a server counts 100 for each CPU in full
use, a summary 100 for all of them, so that it reads the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Self, overload

from dstack_core.models.base import known_fields
from dstack_core.models.money import format_price, format_usd
from dstack_core.models.records import Metric

if TYPE_CHECKING:
    from dstack_core.models.plan import Offer
    from dstack_core.models.usage_chart import UsageChart

# A chart in a UI is some 700 pixels wide. With more points, an outcome in a host's database would be mostly
# this series; with fewer, a long run's chart shows no shape.
_MOST_POINTS = 60
# Servers measure the nodes of a run within the same ten seconds, but not in the same moment.
_SERVER_STEP = 10.0
_GPU_UTIL = "gpu_util_percent_gpu"
_GPU_MEMORY = "gpu_memory_usage_bytes_gpu"
_COLUMNS = ("gpu_percent", "gpu_memory_bytes", "cpu_percent", "memory_bytes")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one job has of its machine.

    Attributes:
        cpus: The number of CPUs, None if unknown.
        memory: The memory in bytes, None if unknown.
        gpus: The number of GPUs.
        gpu: The name of the GPUs (``"A100"``), None if it has none.
        gpu_memory: The memory of one GPU in bytes, None if unknown.
        gpu_vendor: The vendor in the server's word (``"nvidia"``), None if unknown.

    Source: PROTOCOL 1.5.
    """

    cpus: float | None = None
    memory: int | None = None
    gpus: int = 0
    gpu: str | None = None
    gpu_memory: int | None = None
    gpu_vendor: str | None = None


@dataclass(frozen=True, slots=True)
class UsageSeries:
    """Usage over time in at most 60 points, oldest first; all columns have the same length.

    Attributes:
        times: When, in seconds since the epoch.
        counts: The number of measured values behind each point.
        gpu_percent: The mean use of all GPUs (percent); None where it was not measured.
        gpu_memory_bytes: The memory in use on the fullest GPU (bytes); None where it was not measured.
        cpu_percent: The use of all CPUs (percent; 100: all are busy); None where their number is unknown.
        memory_bytes: The memory in use, without caches that can be dropped (bytes).
    """

    times: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    gpu_percent: tuple[float | None, ...] = ()
    gpu_memory_bytes: tuple[float | None, ...] = ()
    cpu_percent: tuple[float | None, ...] = ()
    memory_bytes: tuple[float | None, ...] = ()

    @property
    def rows(self) -> list[_Row]:
        """The points, each as a row."""
        return [
            _Row(time, count, tuple(values))
            for time, count, *values in zip(
                self.times, self.counts, *(getattr(self, name) for name in _COLUMNS), strict=True
            )
        ]

    @classmethod
    def of(cls, rows: Iterable[_Row]) -> Self:
        """Return the rows as columns, rounded to what a chart can show."""
        kept = list(rows)
        # A tenth of a percent, a tenth of a second, and whole bytes.
        digits: tuple[int | None, ...] = (1, None, 1, None)
        columns = [
            tuple(
                None if row.values[at] is None else round(row.values[at] or 0.0, digits[at]) for row in kept
            )
            for at in range(len(_COLUMNS))
        ]
        return cls(tuple(round(row.time, 1) for row in kept), tuple(row.count for row in kept), *columns)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return what ``to_dict`` of the summary wrote, in this or another version.

        Raises ``ValueError`` if the columns do not have the same length.
        """
        columns = {name: tuple(values) for name, values in known_fields(cls, data).items()}
        length = len(columns.get("times", ()))
        series = cls(**{**dict.fromkeys(_COLUMNS, (None,) * length), "counts": (1,) * length, **columns})
        _ = series.rows
        return series


@dataclass(frozen=True, slots=True)
class _Row:
    """One point: the time, the number of values behind it, and the values in the order of ``_COLUMNS``."""

    time: float
    count: int
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Utilization:
    """How busy the machine of a run was.

    Attributes:
        gpu_mean: The mean use of the GPUs over time and over all GPUs (percent), None without a GPU.
        gpu_max: The highest use of any GPU (percent), likewise.
        gpu_memory_peak: The highest use of memory on one GPU (bytes), likewise.
        gpu_memory_total: The memory of one GPU (bytes), likewise, or None if unknown.
        cpu_mean: The mean use of the CPUs (percent; 100: all are busy), None if their number is unknown.
        cpu_max: The highest use of all CPUs (percent), likewise.
        memory_peak: The highest use of memory on one machine (bytes), without caches that can be dropped.
        memory_total: The memory of one machine (bytes), None if unknown.
        gpus: The number of GPUs that were measured, on all nodes.
        gpu: The name of the GPUs (str), or None.
        seconds: The time between the first and the last value, in seconds.
        points: The number of values behind the means.
        advice: A sentence on a smaller GPU that would do, or an empty one.
        series: The use over time, for a chart.

    Source: PROTOCOL 1.9.
    """

    gpu_mean: float | None = None
    gpu_max: float | None = None
    gpu_memory_peak: int | None = None
    gpu_memory_total: int | None = None
    cpu_mean: float | None = None
    cpu_max: float | None = None
    memory_peak: int | None = None
    memory_total: int | None = None
    gpus: int = 0
    gpu: str | None = None
    seconds: float = 0.0
    points: int = 0
    advice: str = ""
    series: UsageSeries = field(default_factory=UsageSeries, repr=False)

    def merged(self, later: Utilization | None) -> Utilization:
        """Return the summary of both: of what was measured until now, and of what was measured since."""
        if later is None:
            return self
        rows = _thinned([*self.series.rows, *later.series.rows])
        return replace(
            _from_rows(rows),
            gpu_max=_most(self.gpu_max, later.gpu_max),
            gpu_memory_peak=_most(self.gpu_memory_peak, later.gpu_memory_peak),
            gpu_memory_total=later.gpu_memory_total or self.gpu_memory_total,
            cpu_max=_most(self.cpu_max, later.cpu_max),
            memory_peak=_most(self.memory_peak, later.memory_peak),
            memory_total=later.memory_total or self.memory_total,
            gpus=max(self.gpus, later.gpus),
            gpu=later.gpu or self.gpu,
            advice=later.advice or self.advice,
        )

    def with_advice(self, offer: Offer, price: float) -> Utilization:
        """Return a copy that advises the GPU of ``offer`` instead of a machine of ``price`` USD per hour."""
        used, total = (format_gigabytes(size or 0) for size in (self.gpu_memory_peak, self.gpu_memory_total))
        name = f" ({offer.gpu})" if offer.gpu else ""
        smaller = f"{format_gigabytes(offer.gpu_memory or 0)} GB{name}"
        return replace(
            self,
            advice=f"GPU memory peaked at {used} of {total} GB: at today's offers a machine with {smaller} "
            f"costs {format_price(offer.price_per_hour)} instead of {format_usd(price)}.",
        )

    def plot(self, title: str = "") -> UsageChart:
        """Return a chart of the use over time; a notebook shows it.

        ``title`` (str) is its headline. Example: ``outcome.utilization.plot().save("usage.svg")``.
        """
        from dstack_core.models.usage_chart import summary_chart

        return summary_chart(self, title)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON has."""
        series = {name: list(values) for name, values in asdict(self.series).items()}
        return {**asdict(self), "series": series}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return what ``to_dict`` wrote, in this or another version.

        A field that this version does not know is ignored; a missing one has its default.
        """
        known = known_fields(cls, data)
        return cls(**{**known, "series": UsageSeries.from_dict(known.get("series") or {})})


@dataclass(frozen=True, slots=True)
class RunMetrics(Sequence[Metric]):
    """What the jobs of a run used of their machines: a sequence of its series.

    Each ``Metric`` names its job (``node``, ``replica``). An empty one is false: a server has no values
    before a job has run for about 20 seconds. In a notebook it is shown as a chart.

    Attributes:
        run_name: The run's name.
        series: The series, those of one job one after the other.
        hardware: What each job has of its machine.
    """

    run_name: str
    series: tuple[Metric, ...] = ()
    hardware: Hardware = Hardware()

    @overload
    def __getitem__(self, index: int) -> Metric: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Metric]: ...
    def __getitem__(self, index: int | slice) -> Metric | Sequence[Metric]:
        """Return one series, or some of them."""
        return self.series[index]

    def __len__(self) -> int:
        return len(self.series)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self.series)

    def get(self, name: str, node: int = 0, replica: int = 0) -> Metric | None:
        """Return the series of that name of one job, or None without one.

        Args:
            name: The server's name, such as ``"gpu_util_percent_gpu0"``.
            node: The job's node, counted from 0.
            replica: The job's replica, counted from 0.
        """
        wanted = (name, node, replica)
        return next((each for each in self if (each.name, each.node, each.replica) == wanted), None)

    def summary(self) -> Utilization:
        """Return the means and peaks of all series; all are None if there are none."""
        return utilization_of(self.series, self.hardware) or Utilization()

    def plot(self, title: str | None = None) -> UsageChart:
        """Return a chart with a line for each GPU and node; a notebook shows it.

        ``title`` (str) is its headline, by default the run's name.
        Example: ``run.metrics().plot().save("usage.svg")``.
        """
        from dstack_core.models.usage_chart import metrics_chart

        return metrics_chart(self, self.run_name if title is None else title)

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()


def format_gigabytes(size: float) -> str:
    """Return bytes as GB without the unit, as dstack and GPU vendors count them: ``11``, ``0.4``."""
    amount = size / 2**30
    if 0 < amount < 0.1:
        return "under 0.1"
    return f"{amount:.0f}" if amount >= 10 else f"{amount:.2g}"


def utilization_of(series: Iterable[Metric], hardware: Hardware) -> Utilization | None:
    """Return the summary of series, None without any value.

    The server's own totals count before those of the machine: servers before 0.19 send none.
    """
    jobs: dict[tuple[int, int], dict[str, Metric]] = {}
    for metric in series:
        jobs.setdefault((metric.replica, metric.node), {})[metric.name] = metric
    found = [each for each in (_of_job(job, hardware) for job in jobs.values()) if each is not None]
    if not found:
        return None
    rows = [row for each in found for row in each.series.rows]
    whole = _from_rows(_thinned(rows, step=_SERVER_STEP if len(found) > 1 else 0.0))
    return replace(
        whole,
        gpu_max=_most(*(each.gpu_max for each in found)),
        gpu_memory_peak=_most(*(each.gpu_memory_peak for each in found)),
        gpu_memory_total=found[0].gpu_memory_total,
        cpu_max=_most(*(each.cpu_max for each in found)),
        memory_peak=_most(*(each.memory_peak for each in found)),
        memory_total=found[0].memory_total,
        seconds=_seconds(rows),
        gpus=sum(each.gpus for each in found),
        gpu=hardware.gpu,
    )


def _of_job(job: Mapping[str, Metric], hardware: Hardware) -> Utilization | None:
    timeline = next((job[name] for name in ("cpu_usage_percent", "memory_usage_bytes") if name in job), None)
    if timeline is None or not timeline.timestamps:
        return None
    utils = [_by_time(metric) for name, metric in job.items() if name.startswith(_GPU_UTIL)]
    memories = [_by_time(metric) for name, metric in job.items() if name.startswith(_GPU_MEMORY)]
    cpus = _latest(job.get("cpus_detected_num")) or hardware.cpus
    cpu = _by_time(job.get("cpu_usage_percent"))
    memory = _by_time(job.get("memory_working_set_bytes") or job.get("memory_usage_bytes"))
    rows = []
    gpu_max: float | None = None
    for moment in timeline.timestamps:
        gpu = [each[moment] for each in utils if moment in each]
        gpu_max = _most(gpu_max, *gpu)
        used = None if cpus is None or moment not in cpu else cpu[moment] / cpus
        values = (
            sum(gpu) / len(gpu) if gpu else None,
            _most(*(each.get(moment) for each in memories)),
            used,
            memory.get(moment),
        )
        rows.append(_Row(moment.timestamp(), 1, values))
    total = _latest(job.get("gpu_memory_total_bytes")) or hardware.gpu_memory
    machine = _latest(job.get("memory_total_bytes")) or hardware.memory
    return Utilization(
        gpu_max=gpu_max,
        gpu_memory_peak=_whole(_most(*(row.values[1] for row in rows))),
        gpu_memory_total=_whole(total) if memories else None,
        cpu_max=_rounded(_most(*(row.values[2] for row in rows))),
        memory_peak=_whole(_most(*(row.values[3] for row in rows))),
        memory_total=_whole(machine),
        gpus=len(utils),
        series=UsageSeries.of(rows),
    )


def _from_rows(rows: Sequence[_Row]) -> Utilization:
    """Return what the points show by themselves: the means, the time and the number of values."""
    return Utilization(
        gpu_mean=_rounded(_mean(rows, 0)),
        cpu_mean=_rounded(_mean(rows, 2)),
        seconds=_seconds(rows),
        points=sum(row.count for row in rows),
        series=UsageSeries.of(rows),
    )


def _seconds(rows: Sequence[_Row]) -> float:
    times = [row.time for row in rows]
    return round(max(times) - min(times), 1) if times else 0.0


def _thinned(rows: Iterable[_Row], step: float = 0.0) -> list[_Row]:
    """Return at most ``_MOST_POINTS`` points in order, those within ``step`` seconds joined in any case."""
    ordered = sorted(rows, key=lambda row: row.time)
    if not ordered or (len(ordered) <= _MOST_POINTS and not step):
        return ordered
    start, span = ordered[0].time, ordered[-1].time - ordered[0].time
    width = max(step, span / _MOST_POINTS if len(ordered) > _MOST_POINTS else 0.0) or 1.0
    bins: dict[int, list[_Row]] = {}
    for row in ordered:
        bins.setdefault(min(int((row.time - start) / width), _MOST_POINTS - 1), []).append(row)
    return [_joined(each) for each in bins.values()]


def _joined(rows: Sequence[_Row]) -> _Row:
    count = sum(row.count for row in rows)
    time = sum(row.time * row.count for row in rows) / count
    # Memory is what fits or does not: its peak counts. A percentage is a mean over the time.
    peaks = [_most(*(row.values[at] for row in rows)) for at in (1, 3)]
    return _Row(time, count, (_mean(rows, 0), peaks[0], _mean(rows, 2), peaks[1]))


def _mean(rows: Iterable[_Row], at: int) -> float | None:
    known = [(row.values[at] or 0.0, row.count) for row in rows if row.values[at] is not None]
    weight = sum(count for _, count in known)
    return sum(value * count for value, count in known) / weight if weight else None


def _most(*values: Any) -> Any:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _by_time(metric: Metric | None) -> dict[Any, float]:
    pairs = () if metric is None else zip(metric.timestamps, metric.values, strict=True)
    return {moment: value for moment, value in pairs if isfinite(value)}


def _latest(metric: Metric | None) -> float | None:
    value = metric.values[-1] if metric is not None and metric.values else 0.0
    return value if isfinite(value) and value > 0 else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


@dataclass(frozen=True, slots=True)
class UtilizationSoFar:
    """What was measured of a run that is followed for longer than its server keeps values.

    Attributes:
        sampled_at: When the values were read last, in seconds since the epoch.
        until: The time of the last value by job, ``"replica.node"``, in seconds since the epoch.
        summary: The summary of all values until then, or None.
    """

    sampled_at: float
    until: Mapping[str, float] = field(default_factory=dict)
    summary: Utilization | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON has."""
        summary = None if self.summary is None else self.summary.to_dict()
        return {"sampled_at": self.sampled_at, "until": dict(self.until), "summary": summary}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return what ``to_dict`` wrote, in this or another version."""
        known = known_fields(cls, data)
        summary = known.get("summary")
        return cls(**{**known, "summary": None if summary is None else Utilization.from_dict(summary)})
