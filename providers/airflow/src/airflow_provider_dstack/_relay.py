"""Turn a run's events into log records; the same for the worker and the triggerer."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from airflow_provider_dstack._frames import without_frames

if TYPE_CHECKING:
    from dstack_core import Event, LogLines, Outcome

_RECORD_BYTES = 16 * 1024
_FEW_LINES = 32
_TAIL_LINES = 20
_TAIL_CHARACTERS = 500


class Relay:
    """Write events as log records and remember the last log lines.

    ``tail`` (list of str) are lines already seen, when another process relayed the first part.
    """

    def __init__(self, tail: Iterable[str] = ()) -> None:
        self._tail: deque[str] = deque(tail, maxlen=_TAIL_LINES)

    @property
    def tail(self) -> list[str]:
        """Return the last log lines, oldest first, long ones cut."""
        return list(self._tail)

    def records(self, event: Event) -> Iterator[tuple[int, str]]:
        """Yield ``(logging level, text)`` for an event.

        A few log lines are a record each, which reads best; many are packed into records of up to 16 KiB.
        """
        from dstack_core import ContactLost, ContactRestored, LogLines, RunFinished, StatusChanged

        match event:
            case LogLines():
                many = len(event.lines) > _FEW_LINES
                for text in _packed(self._remembered(event), _RECORD_BYTES if many else 0):
                    yield logging.INFO, text
            case StatusChanged(status=status) if not status.is_finished:
                detail = f" ({event.message})" if event.message else ""
                yield logging.INFO, f"Run {event.progress.run_name} is {status}{detail}"
            case ContactLost():
                yield (
                    logging.WARNING,
                    f"{event.error}; the run goes on, trying again for another {event.gives_up_in:.0f} s",
                )
            case ContactRestored():
                yield logging.INFO, f"The dstack server answers again after {event.silent_for:.0f} s"
            case RunFinished(outcome=outcome):
                yield logging.INFO, _summary(outcome)

    def _remembered(self, event: LogLines) -> Iterator[str]:
        prefix = _prefix(event)
        for logged in event.lines:
            line = without_frames(logged)
            if line is None:
                continue
            self._tail.append(f"{prefix}{line}"[:_TAIL_CHARACTERS])
            yield f"{prefix}{line}"


def _summary(outcome: Outcome) -> str:
    parts = [f"Run {outcome.run_name} {outcome.message}"]
    if outcome.instance:
        parts.append(f"machine {outcome.instance} ({outcome.backend})")
    if outcome.duration is not None:
        parts.append(f"{outcome.duration:.0f} s")
    return ", ".join([*parts, f"{outcome.cost:g} USD"])


def _prefix(event: LogLines) -> str:
    """Say whose line it is where a run has more than one log: several replicas, nodes or attempts."""
    parts = {"replica": event.replica, "node": event.node, "attempt": event.attempt}
    told = " ".join(f"{name} {number}" for name, number in parts.items() if number)
    return f"[{told}] " if told else ""


def _packed(lines: Iterable[str], size_limit: int) -> Iterator[str]:
    """Join whole lines into few records: the triggerer pays for every record, and loses huge ones."""
    batch: list[str] = []
    size = 0
    for line in lines:
        for piece in _pieces(line):
            length = len(piece.encode("utf-8", "replace")) + 1
            if batch and size + length > size_limit:
                yield "\n".join(batch)
                batch, size = [], 0
            batch.append(piece)
            size += length
    if batch:
        yield "\n".join(batch)


def _pieces(line: str) -> Iterator[str]:
    # A character takes at most four bytes, so this many always fit one record.
    step = _RECORD_BYTES // 4 - 1
    if len(line) <= step:
        yield line
        return
    for start in range(0, len(line), step):
        yield line[start : start + step]
