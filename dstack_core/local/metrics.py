"""What the jobs use of this machine, measured and shown as a real server does (PROTOCOL 1.9).

A job's values are those of all its processes, read from ``/proc`` every ten seconds by default. Where there
is no ``/proc`` (not Linux), a job has none, as on a server whose runner cannot measure. The simulated GPUs do
nothing, so they are measured only on request: ``LocalServer(gpu_usage=...)`` or the variable
``DSTACK_LOCAL_GPU_USAGE`` of a run.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, BeforeValidator

from dstack_core import clock
from dstack_core.local import reaper
from dstack_core.local.logs import iso

GpuUsage = Callable[[float], tuple[float, float]] | tuple[float, float]
# As long as a server keeps the values of a running job by default.
_KEPT_SECONDS = 3600.0
_GIB = 2**30
_VARIABLE = "DSTACK_LOCAL_GPU_USAGE"


@dataclass(frozen=True, slots=True)
class Point:
    """What a job has used at one moment: ``cpu`` in microseconds since its start, memory in bytes.

    ``gpus`` are ``(percent, bytes)`` of each GPU.
    """

    micro: int
    cpu: int
    memory: int
    gpus: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Meter:
    """Measures the processes of one job: its session, and others that carry its marker."""

    session: int
    marker: str
    gpus: int
    usage: GpuUsage | None
    started: float

    def read(self, before: Point | None) -> Point | None:
        """Return what the job uses now, None without ``/proc`` or if nothing of it is left; blocks."""
        found = [_process(pid) for pid in reaper.members([self.session], self.marker)]
        known = [each for each in found if each is not None]
        if not known:
            return None
        # The counter of a container never falls, but the time of a daemon that has ended is lost here.
        cpu = max(sum(each[0] for each in known), before.cpu if before is not None else 0)
        memory = sum(each[1] for each in known)
        return Point(int(clock.epoch() * 1_000_000), cpu, memory, self._gpus())

    def _gpus(self) -> tuple[tuple[int, int], ...]:
        if self.usage is None or not self.gpus:
            return ()
        usage = self.usage
        percent, gigabytes = usage(clock.monotonic() - self.started) if callable(usage) else usage
        return ((round(percent), round(gigabytes * _GIB)),) * self.gpus


class MetricsStore:
    """The values of all jobs, by submission; call every method in the server's event loop."""

    def __init__(self, seconds: float, usage: GpuUsage | None) -> None:
        self._seconds = seconds
        self._usage = usage
        self._points: dict[str, deque[Point]] = {}

    async def measure(
        self, submission_id: str, session: int, marker: str, *, gpus: int, env: Mapping[str, str]
    ) -> None:
        """Measure a job until this task is cancelled."""
        usage = _simulated(env.get(_VARIABLE)) or self._usage
        meter = Meter(session, marker, gpus, usage, clock.monotonic())
        points = self._points.setdefault(
            submission_id, deque(maxlen=round(_KEPT_SECONDS / self._seconds) + 1)
        )
        while True:
            await asyncio.sleep(self._seconds)
            point = await asyncio.to_thread(meter.read, points[-1] if points else None)
            if point is not None:
                points.append(point)

    def points(self, submission_id: str) -> list[Point]:
        """Return the values of a submission, newest first."""
        return list(reversed(self._points.get(submission_id, ())))


def _aware(value: Any) -> Any:
    # A query writes the "+" of an offset as a space if a client does not escape it.
    return value.replace(" ", "+") if isinstance(value, str) else value


class MetricsQuery(BaseModel):
    """The parameters of a request for metrics."""

    run_id: UUID | None = None
    replica_num: int = 0
    job_num: int = 0
    limit: int = 1
    after: Annotated[datetime | None, BeforeValidator(_aware)] = None
    before: Annotated[datetime | None, BeforeValidator(_aware)] = None

    def chosen(self, points: list[Point]) -> list[Point]:
        """Return the requested values and the one before them, newest first."""
        after, before = (None if each is None else _micro(each) for each in (self.after, self.before))
        kept = [
            point
            for point in points
            if (after is None or point.micro >= after) and (before is None or point.micro < before)
        ]
        # The use of the CPU is a difference, so one value more is needed than is returned.
        return kept[: self.limit + 1]


def job_metrics(points: list[Point], resources: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the reply for values, newest first; an empty one for fewer than two."""
    if len(points) < 2:
        return {"metrics": []}
    shown = points[:-1]
    times = [iso(datetime.fromtimestamp(0, UTC) + timedelta(microseconds=point.micro)) for point in shown]

    def metric(name: str, values: list[Any]) -> dict[str, Any]:
        return {"name": name, "timestamps": times, "values": values}

    def constant(name: str, value: Any) -> dict[str, Any]:
        return metric(name, [value] * len(times))

    busy = [_percent(point, older) for point, older in itertools.pairwise(points)]
    metrics = [
        metric("cpu_usage_percent", busy),
        metric("memory_usage_bytes", [point.memory for point in shown]),
        metric("memory_working_set_bytes", [point.memory for point in shown]),
    ]
    if resources is not None:
        metrics.append(constant("cpus_detected_num", resources["cpus"]))
        metrics.append(constant("memory_total_bytes", resources["memory_mib"] * 2**20))
    gpus = len(shown[0].gpus)
    metrics.append(constant("gpus_detected_num", gpus))
    if resources is not None and resources["gpus"]:
        metrics.append(constant("gpu_memory_total_bytes", resources["gpus"][0]["memory_mib"] * 2**20))
    for name, at in (("gpu_memory_usage_bytes_gpu", 1), ("gpu_util_percent_gpu", 0)):
        metrics += [metric(f"{name}{gpu}", [point.gpus[gpu][at] for point in shown]) for gpu in range(gpus)]
    return {"metrics": metrics}


def _percent(point: Point, older: Point) -> int:
    window = point.micro - older.micro
    return round((point.cpu - older.cpu) / window * 100) if window else 0


def _micro(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)


def _simulated(text: str | None) -> tuple[float, float] | None:
    """Read ``PERCENT GIGABYTES`` such as ``97 11.5``; None for anything else."""
    try:
        percent, gigabytes = map(float, (text or "").split())
    except ValueError:
        return None
    return percent, gigabytes


def _process(pid: int) -> tuple[int, int] | None:
    """Return the CPU time (microseconds) and the memory (bytes) of a process."""
    try:
        # The command name may contain spaces and parentheses, so count the fields after the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # utime, stime, and those of the children that have ended.
    ticks = sum(map(int, fields[11:15]))
    pages = int(fields[21])
    return ticks * 1_000_000 // os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE")
