"""What the log of a task's try tells of its run's lines, over all processes that wrote to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

# A triggerer sees within a second that its process for the triggers died; what that process told is kept in
# about a tenth of a second, on a machine without a moment to spare in more.
_UNKEPT = timedelta(seconds=2)
_DEATH = re.compile(r"^(\S+Z) .*Trigger runner process has died", re.MULTILINE)
_STARTED = re.compile(r"trigger .* starting")


@dataclass(frozen=True)
class Told:
    """Hold the lines of a try; ``again`` of them were told twice, and are in ``lines`` once.

    That is by a triggerer, and those that the one before it had written in the last moment of its life.
    All other lines are in ``lines`` as often as they were told.
    """

    lines: Sequence[str]
    again: int


def told(log: Sequence[Any], deaths: Sequence[datetime]) -> Told:
    """Read the records of a try's log; ``deaths`` are those of triggerers."""
    lines: list[str] = []
    times: list[datetime] = []
    again = 0
    for part in _processes(log):
        its = [line for _, line in part]
        start = lines.index(its[0]) if its and its[0] in lines else len(lines)
        known = len(lines) - start
        if known > 0 and _is_beginning(its, lines[start:]) and _was_unkept(times[start:], part[0][0], deaths):
            again += min(known, len(its))
            part = part[known:]
        lines += [line for _, line in part]
        times += [time for time, _ in part]
    return Told(lines, again)


def deaths_in(output: Path) -> list[datetime]:
    """Return when a triggerer that writes to ``output`` saw the process of its triggers die."""
    return [datetime.fromisoformat(found) for found in _DEATH.findall(output.read_text(errors="replace"))]


def _processes(log: Sequence[Any]) -> list[list[tuple[datetime, str]]]:
    """Return the run's lines and their times, by the process that told them: the task's, each triggerer's."""
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
    """Tell whether who told this at ``times`` died at once, before it was told ``again``."""
    return any(times[0] <= death <= again and death - times[0] <= _UNKEPT for death in deaths)
