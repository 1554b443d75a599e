"""The lines of a run in the log of a task's try, which several processes may have written.

A deferred task's log is written by the task's process and by each triggerer that followed the run. A triggerer
that is killed may have written lines before Airflow stored its position; the next triggerer then writes these
lines again. Only this repetition is accepted: the records are split by process, and if the lines of a process
begin with lines that are already known, these count as repeated, on two conditions. They must continue in the
same order until the known lines end, and a triggerer must have died within `_UNKEPT` after the first of them
was written, before they were written again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

# A triggerer notices within a second that its process for the triggers died. What that process logged is stored
# within about 0.1 s, later on a busy machine.
_UNKEPT = timedelta(seconds=2)
_DEATH = re.compile(r"^(\S+Z) .*Trigger runner process has died", re.MULTILINE)
_STARTED = re.compile(r"trigger .* starting")


@dataclass(frozen=True)
class TryLines:
    """The lines of a try, of which ``repeated`` are in the log twice and in ``lines`` once.

    These were written by a triggerer just before it died, and again by the next one. All other lines are in
    ``lines`` as often as in the log.
    """

    lines: Sequence[str]
    repeated: int


def lines_of_try(log: Sequence[Any], deaths: Sequence[datetime]) -> TryLines:
    """Return the lines in the records of a try's log; ``deaths`` are the times when triggerers died."""
    lines: list[str] = []
    times: list[datetime] = []
    repeated = 0
    for part in _processes(log):
        its = [line for _, line in part]
        start = lines.index(its[0]) if its and its[0] in lines else len(lines)
        known = len(lines) - start
        if known > 0 and _is_beginning(its, lines[start:]) and _was_unkept(times[start:], part[0][0], deaths):
            repeated += min(known, len(its))
            part = part[known:]
        lines += [line for _, line in part]
        times += [time for time, _ in part]
    return TryLines(lines, repeated)


def deaths_in(output: Path) -> list[datetime]:
    """Return the times when a triggerer, which writes to ``output``, noticed that its triggers' process died."""
    return [datetime.fromisoformat(found) for found in _DEATH.findall(output.read_text(errors="replace"))]


def _processes(log: Sequence[Any]) -> list[list[tuple[datetime, str]]]:
    """Return the run's lines and their times by the process that logged them: the task's, each triggerer's."""
    parts: list[list[tuple[datetime, str]]] = [[]]
    for record in log:
        text = record if isinstance(record, str) else str(record.get("event", ""))
        if _STARTED.match(text):
            parts.append([])
        found = [line for line in text.split("\n") if line.startswith("line-")]
        if found:
            time = datetime.fromisoformat(record["timestamp"])
            parts[-1] += [(time, line) for line in found]
    return parts


def _is_beginning(its: Sequence[str], known: Sequence[str]) -> bool:
    both = min(len(its), len(known))
    return list(its[:both]) == list(known[:both])


def _was_unkept(times: Sequence[datetime], again: datetime, deaths: Sequence[datetime]) -> bool:
    """Return whether the writer of these lines died at once, before they were written ``again``."""
    return any(times[0] <= death <= again and death - times[0] <= _UNKEPT for death in deaths)
