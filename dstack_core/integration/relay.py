"""The way from the events of ``run.follow()`` to the records that a workflow engine logs.

The problem: a run prints hundreds of thousands of lines a second, an engine takes hundreds to thousands of
records a second and refuses or truncates long ones; its UI cannot show what is meant for a terminal; several
nodes write at once; and the log is kept in the engine's database, which a run in an endless loop must not
fill.

The idea: an event holds all lines that one request returned. They are joined once and stay one text while it
is made printable, masked, prefixed and measured, and are cut into records only at the end. Each step is a few
searches in that text, so that a line without anything unusual costs no Python code of its own.

Invariants:
  * Every line is in one record, whole and in order, until the budget is used up; a line longer than a record
    is split over several, and no character is lost. Once a line was left out, no later one is shown: a log
    with holes misleads.
  * ``state()`` changes only after the caller took all records of an event. It belongs to that event's
    ``progress``: another process that begins with both continues with the next line and the same budget.
  * What is masked is masked before anything is cut.

Measured (lines of 100 characters, 5 secrets): 0.26 to 0.57 million lines a second of processor time with
the client included, 0.18 to 0.33 when each line was treated alone; 5 million without the client and secrets.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstack_core import clock
from dstack_core.integration.masking import Masker, printable
from dstack_core.models.durations import format_duration
from dstack_core.models.events import (
    ContactLost,
    ContactRestored,
    Event,
    LogLines,
    PartialLine,
    Reported,
    ReportsDropped,
    RunFinished,
    StatusChanged,
    Waiting,
)

Record = tuple[int, str]
"""A level of ``logging`` and a text."""

# Bytes: 100,000 lines of 100 characters, more than a person reads in a UI. They cost a triggerer of Airflow
# about 10 s of processor time (measured: 1 s a MB), and Prefect's server some 600 records (it takes 450 a
# second). More lets one run in an endless loop fill the engine's database; less cuts the logs of ordinary
# trainings.
DEFAULT_LOG_BUDGET = 10_000_000
# What an error quotes: a Python traceback is about as long. At most 10 kB, because XComs and events keep it.
TAIL_LINES = 20
TAIL_CHARACTERS = 500
# An unreachable server is retried every few seconds for ten minutes: ten warnings instead of a hundred.
_SECONDS_BETWEEN_WARNINGS = 60.0
# A progress that is reported at each step of a training would fill the log.
_SECONDS_BETWEEN_PROGRESS = 30.0
_DROPPED = {
    "broken": "The run wrote a message that is broken; the log shows it as text.",
    "too large": (
        "The run reported more in one message than is kept (1 MiB by default); it is left out. Write what is "
        "large to a volume or a bucket, and report where it is."
    ),
    "too many": (
        "The run reports more messages per second than are kept (1000 by default); the others are left out. "
        "Report less often."
    ),
}
# The length of the longest UTF-8 character, so that a record always has room for one.
_LEAST_BYTES = 4


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """The sizes of the records that a host takes.

    Args:
        max_bytes: Most bytes (UTF-8) of a record. Default: 16 KiB, since an Airflow triggerer is safe up to
            64 KiB, and Prefect Cloud refuses more than 25,000 characters.
        max_lines: Most lines of a record; None for no limit.
        few_lines: If an event has at most this many lines, each is a record, which reads best; more are
            packed. Default: 0, always packed.
        alone: Marks whose lines are a record each, for a host whose viewer gives a record a meaning by them
            (str). Default: none.

    Raises:
        ValueError: No record can meet the limits.
    """

    max_bytes: int = 16 * 1024
    max_lines: int | None = None
    few_lines: int = 0
    alone: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for limits that no record meets."""
        if self.max_bytes < _LEAST_BYTES:
            raise ValueError(f"max_bytes: expected {_LEAST_BYTES} or more, got {self.max_bytes!r}.")
        if self.max_lines is not None and self.max_lines < 1:
            raise ValueError(f"max_lines: expected 1 or more, or None, got {self.max_lines!r}.")


class LogRelay:
    """The log of one run, from the events of ``run.follow()`` to the records that a host logs.

    Args:
        secrets: The texts that are shown as ``***``; see ``collect_secrets``.
        limits: The sizes of the records. Default: ``RecordLimits()``.
        log_budget_bytes: Bytes of log (UTF-8) to show, in whole lines; None shows everything. Default: 10 MB.
        shows_log: Whether ``records`` returns log lines; ``tail`` has the last ones in any case.
        url: The page of the run, for the message that lines are left out.
        tail: The last lines that another process relayed, from its ``state()``.
        relayed_bytes: Bytes of log that another process relayed, from its ``state()``.
        left_out_bytes: Bytes of log that another process left out, from its ``state()``.
        already_logged: How often each line was logged before, for a run that is followed from its first line
            again; each line is left out as often. For hosts that keep logs but no position.
        clock: Returns seconds, for the rate at which progress is logged.

    Example::

        relay = LogRelay(secrets=collect_secrets(env=run.env), url=run.url)
        for event in run.follow():
            for level, text in relay.records(event):
                logger.log(level, "%s", text)
    """

    def __init__(
        self,
        *,
        secrets: Iterable[str | None] = (),
        limits: RecordLimits | None = None,
        log_budget_bytes: int | None = DEFAULT_LOG_BUDGET,
        shows_log: bool = True,
        url: str = "",
        tail: Iterable[str] = (),
        relayed_bytes: int = 0,
        left_out_bytes: int = 0,
        already_logged: Mapping[str, int] | None = None,
        clock: Callable[[], float] = clock.monotonic,
    ) -> None:
        self.url = url
        self.shows_log = shows_log
        self.masker = Masker(secrets)
        self._limits = limits or RecordLimits()
        self._budget = log_budget_bytes
        self._relayed = relayed_bytes
        self._left_out = left_out_bytes
        # Thousands of relays wait for runs that are silent: what is empty is small, unlike a deque or a set.
        self._tail = [*map(self.masker.mask, tail)][-TAIL_LINES:]
        self._already_logged: dict[str, int] = dict(Counter(already_logged)) if already_logged else {}
        self._warned_after: float | None = None
        self._clock = clock
        self._progress_at: float | None = None
        self._progress = 0.0
        self._dropped: tuple[str, ...] = ()

    @property
    def tail(self) -> list[str]:
        """The last 20 log lines, oldest first, each cut after 500 characters."""
        return list(self._tail)

    @property
    def shows_tail(self) -> bool:
        """Whether the lines of ``tail`` are among the records: not if lines were left out."""
        return self.shows_log and not self._left_out

    def state(self) -> dict[str, Any]:
        """Return the arguments with which another process continues, as values that JSON has."""
        return {"tail": self.tail, "relayed_bytes": self._relayed, "left_out_bytes": self._left_out}

    def leave_out(self, lines: Mapping[str, int]) -> None:
        """Leave out lines that were logged before, each as often as that: more of ``already_logged``."""
        self._already_logged = dict(Counter(self._already_logged) + Counter(lines))

    def begin_run(self, url: str) -> None:
        """Begin the log of another run of the same job: the last lines are those of one run."""
        self.url = url
        self._tail = []
        self._progress_at, self._progress = None, 0.0

    def records(self, event: Event) -> Iterator[Record]:
        """Yield the records to log for an event: pairs of a level of ``logging`` and a text.

        The caller reports the outcome of ``RunFinished`` and the final status.
        """
        match event:
            case LogLines(lines=lines) if lines:
                yield from self._of_lines(event)
            case StatusChanged(status=status) if not status.is_finished:
                yield logging.INFO, f"Run {event.progress.run_name}: {status}{_in_words(event.message)}"
            case PartialLine() if self.shows_tail:
                yield from self._of_open_line(event)
            case Waiting():
                so_far = format_duration(max(0.0, clock.epoch() - event.since.timestamp()))
                text = self.masker.mask(printable(" ".join(event.text.split())))
                yield logging.INFO, f"Run {event.progress.run_name} waits for {text} ({so_far} so far)"
            case ContactLost():
                yield from self._of_fault(event)
            case ContactRestored():
                self._warned_after = None
                yield logging.INFO, f"The dstack server answers again after {event.silent_for:.0f} s."
            case Reported(kind="progress"):
                yield from self._of_progress(event)
            case ReportsDropped(reason=reason) if reason not in self._dropped:
                self._dropped += (reason,)
                yield logging.WARNING, _DROPPED.get(reason, f"A message of the run was left out: {reason}.")
            case RunFinished() if self._left_out:
                self.url = self.url or event.outcome.url or ""
                yield logging.WARNING, f"{_size(self._left_out)} of the log is not shown here.{self._see()}"

    def _of_progress(self, event: Reported) -> Iterator[Record]:
        fraction, text = describe_progress(event.payload)
        now = self._clock()
        is_due = self._progress_at is None or now >= self._progress_at + _SECONDS_BETWEEN_PROGRESS
        # The end is shown once, whenever it comes.
        if is_due or (fraction >= 1 > self._progress):
            self._progress_at = now
            yield logging.INFO, self.masker.mask(printable(text))
        self._progress = fraction

    def _of_fault(self, event: ContactLost) -> Iterator[Record]:
        last = self._warned_after
        # A shorter silence than at the last warning belongs to a new outage, which gets its own warning.
        if last is not None and last <= event.silent_for < last + _SECONDS_BETWEEN_WARNINGS:
            return
        self._warned_after = event.silent_for
        # Before the submission there is no run yet.
        retrying = "Retrying" if event.progress.run_id is None else "The run keeps running; retrying"
        yield logging.WARNING, f"{event.error.rstrip('.')}. {retrying} for another {event.gives_up_in:.0f} s."

    def _of_open_line(self, event: PartialLine) -> Iterator[Record]:
        # It may have been read in the middle of a secret, which would not be recognized.
        line = self.masker.without_start(self.masker.mask(printable(event.line)))[:TAIL_CHARACTERS].rstrip()
        if line:
            time = f"{short_time(event.times[0])} " if event.times else ""
            yield logging.INFO, f"{time}{line_prefix(event)}{line} (still running)"

    def _of_lines(self, event: LogLines) -> Iterator[Record]:
        text = self.masker.mask(printable("\n".join(event.lines)))
        if prefix := line_prefix(event):
            text = prefix + text.replace("\n", f"\n{prefix}")
        tail = text.rsplit("\n", TAIL_LINES)[-TAIL_LINES:]
        if event.times:
            timed = zip(event.times, text.split("\n"), strict=True)
            text = "\n".join(f"{short_time(time)} {line}" for time, line in timed)
        # Written back at the end: if the caller stops in the middle, ``state()`` still belongs to the event
        # before.
        relayed, left_out = self._relayed, self._left_out
        if self.shows_log:
            data = text.encode()
            shown = self._affordable(data)
            if shown is not None:
                relayed += len(shown) + 1
                for record in self._cut(shown, len(event.lines)):
                    if (fresh := self._not_logged_yet(record)) is not None:
                        yield logging.INFO, fresh
            left_out += len(data) - (-1 if shown is None else len(shown))
            if left_out and not self._left_out and self._budget is not None:
                yield (
                    logging.WARNING,
                    f"The log is longer than its budget of {_size(self._budget)}; the rest is not shown here."
                    f"{self._see()}",
                )
        self._relayed, self._left_out = relayed, left_out
        self._tail = [*self._tail, *(line[:TAIL_CHARACTERS] for line in tail)][-TAIL_LINES:]

    def _affordable(self, data: bytes) -> bytes | None:
        """Return the lines of ``data`` that the budget covers, line ends included; None if it covers none."""
        if self._left_out:
            return None
        if self._budget is None or self._relayed + len(data) < self._budget:
            return data
        # The last line end within the budget, so that only whole lines are shown.
        end = (data + b"\n").rfind(b"\n", 0, max(0, self._budget - self._relayed))
        return None if end < 0 else data[:end]

    def _cut(self, data: bytes, lines: int) -> Iterator[str]:
        if lines <= self._limits.few_lines:
            blocks = data.split(b"\n")
        else:
            marks = [mark.encode() for mark in self._limits.alone if mark.encode() in data]
            blocks = _blocks(data, marks) if marks else [data]
        return (piece for block in blocks for piece in packed(block, self._limits))

    def _not_logged_yet(self, record: str) -> str | None:
        if not self._already_logged:
            return record
        fresh = [line for line in record.split("\n") if not self._was_logged(line)]
        return "\n".join(fresh) if fresh else None

    def _was_logged(self, line: str) -> bool:
        left = self._already_logged.pop(line, 0)
        if left > 1:
            self._already_logged[line] = left - 1
        return left > 0

    def _see(self) -> str:
        return f" See {self.url}" if self.url else ""


def describe_progress(payload: Mapping[str, Any]) -> tuple[float, str]:
    """Return a ``progress`` message as a fraction from 0 to 1, and as a line: ``Progress: 40 % (text)``."""
    done, total = payload.get("done"), payload.get("total")
    if done is not None and total:
        fraction, counted = min(1.0, done / total), f", {done:g} of {total:g}"
    else:
        fraction, counted = payload["value"], ""
    detail = f" ({payload['text']})" if payload.get("text") else ""
    return fraction, f"Progress: {fraction * 100:.0f} %{counted}{detail}"


def short_time(time: str) -> str:
    """Return a time of ``LogLines.times`` with milliseconds: ``2026-11-23T09:30:00.125Z``."""
    return f"{time[:23]}Z"


def line_prefix(event: LogLines | PartialLine) -> str:
    """Return the prefix of the lines of a run with several logs: ``"[node 1, attempt 2] "``, else ``""``.

    Nodes and replicas are numbered as in dstack, from 0 (``DSTACK_NODE_RANK``), and named if there are
    several. Attempts are counted from 1 and named from the second on.
    """
    parts = []
    if event.replicas > 1 or event.replica:
        parts.append(f"replica {event.replica}")
    if event.nodes > 1 or event.node:
        parts.append(f"node {event.node}")
    if event.attempt:
        parts.append(f"attempt {event.attempt + 1}")
    return f"[{', '.join(parts)}] " if parts else ""


def _blocks(data: bytes, marks: list[bytes]) -> list[bytes]:
    """Return the lines of ``data`` in blocks; a line that holds a mark is a block of its own."""
    blocks: list[list[bytes]] = [[]]
    for line in data.split(b"\n"):
        if any(mark in line for mark in marks):
            blocks += [[line], []]
        else:
            blocks[-1].append(line)
    return [b"\n".join(block) for block in blocks if block]


def packed(data: bytes, limits: RecordLimits) -> Iterator[str]:
    """Yield lines as few records; a line that is too long for one is cut into pieces of the greatest size."""
    begin = 0
    while True:
        end = len(data)
        if end - begin > limits.max_bytes:
            end = data.rfind(b"\n", begin, begin + limits.max_bytes + 1)
            if end < 0:
                end = _character_border(data, begin + limits.max_bytes)
        if limits.max_lines is not None:
            lines = data[begin:end].split(b"\n", limits.max_lines)
            if len(lines) > limits.max_lines:
                end -= len(lines[-1]) + 1
        yield data[begin:end].decode()
        if end == len(data):
            return
        begin = end + (data[end] == 0x0A)


def _character_border(data: bytes, limit: int) -> int:
    """Return the last position up to ``limit`` that splits no UTF-8 character."""
    # In UTF-8 every byte of a character but the first begins with the bits 10.
    while data[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def _in_words(detail: str | None) -> str:
    """Return the server's detail on a status behind it, such as ``, exited (127)``."""
    if not detail:
        return ""
    return f", {detail}" if "(" in detail else f" ({detail})"


def _size(number: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"
