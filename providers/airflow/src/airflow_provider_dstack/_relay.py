"""Turn a run's events into log records; the same for the worker and the triggerer."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._frames import without_frames

if TYPE_CHECKING:
    from dstack_core import Event, LogLines, Outcome

DEFAULT_LOG_BUDGET = 10_000_000
_RECORD_BYTES = 16 * 1024
_FEW_LINES = 32
_TAIL_LINES = 20
_TAIL_CHARACTERS = 500
_HIDDEN = "***"
_SHORTEST_HIDDEN = 5


class Relay:
    """Write events as log records and remember the last log lines.

    ``tail`` (list of str) are lines already seen, ``relayed_bytes`` and ``left_out_bytes`` what another
    process relayed and left out of the same run's log; ``log_budget_bytes`` bounds the sum of the former,
    None does not. ``url`` is the run's page; ``secrets`` (texts) are shown as ``***``.
    """

    def __init__(
        self,
        tail: Iterable[str] = (),
        *,
        relayed_bytes: int = 0,
        left_out_bytes: int = 0,
        log_budget_bytes: int | None = None,
        url: str = "",
        secrets: Iterable[str] = (),
    ) -> None:
        self.url = url
        self._relayed = relayed_bytes
        self._left_out = left_out_bytes
        self._budget = log_budget_bytes
        self._secrets = _pattern(secrets)
        self._tail: deque[str] = deque(map(self._hide, tail), maxlen=_TAIL_LINES)

    @property
    def tail(self) -> list[str]:
        """Return the last log lines, oldest first, long ones cut."""
        return list(self._tail)

    def state(self) -> dict[str, Any]:
        """Return, JSON-plain, the arguments with which another process goes on."""
        return {"tail": self.tail, "relayed_bytes": self._relayed, "left_out_bytes": self._left_out}

    def records(self, event: Event) -> Iterator[tuple[int, str]]:
        """Yield ``(logging level, text)`` for an event.

        A few log lines are a record each, which reads best; many are packed into records of up to 16 KiB.
        """
        from dstack_core import ContactLost, ContactRestored, LogLines, RunFinished, StatusChanged

        match event:
            case LogLines():
                many = len(event.lines) > _FEW_LINES
                began = self._left_out
                for text in _packed(self._affordable(event), _RECORD_BYTES if many else 0):
                    yield logging.INFO, text
                if self._left_out and not began:
                    yield logging.WARNING, f"The rest of the log is not shown here{self._see()}"
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
                if self._left_out:
                    self.url = self.url or outcome.url or ""
                    yield logging.WARNING, f"... {_size(self._left_out)} of log not shown{self._see()}"
                yield logging.INFO, _summary(outcome)

    def _affordable(self, event: LogLines) -> Iterator[str]:
        prefix = _prefix(event)
        for logged in event.lines:
            line = without_frames(logged)
            if line is None:
                continue
            # Postgres refuses NUL, and with it the event that carries the last lines to the task.
            shown = self._hide(f"{prefix}{line}").replace("\x00", "\ufffd")
            self._tail.append(shown[:_TAIL_CHARACTERS])
            size = len(shown.encode("utf-8", "replace")) + 1
            # Once a line was left out, no later one is shown: a log with holes misleads.
            if self._left_out or (self._budget is not None and self._relayed + size > self._budget):
                self._left_out += size
            else:
                self._relayed += size
                yield shown

    def _hide(self, text: str) -> str:
        return text if self._secrets is None else self._secrets.sub(_HIDDEN, text)

    def _see(self) -> str:
        return f"; see {self.url}" if self.url else ""


def hidden(text: str, secrets: Iterable[str]) -> str:
    """Return ``text`` with ``***`` for what is secret in it."""
    pattern = _pattern(secrets)
    return text if pattern is None else pattern.sub(_HIDDEN, text)


def _pattern(secrets: Iterable[str]) -> re.Pattern[str] | None:
    """Match any line of any secret, the longest first."""
    lines = {line for secret in secrets for line in secret.splitlines() if len(line) >= _SHORTEST_HIDDEN}
    return re.compile("|".join(map(re.escape, sorted(lines, key=len, reverse=True)))) if lines else None


def _size(number: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"


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
